"""The runs of the study: which data, which way to move scales, how strongly, from where."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """How a data set is trained on.

    Attributes:
        lr: Learning rate of weights and biases.
        scale_lr: Learning rate of scales (the thesis: 1e-4 for 37,500 steps; here are fewer).
        penalty_beta2: Adam's second decay rate for scales that a penalty moves.
    """

    dataset: str
    train_images: int
    test_images: int
    epochs: int
    batch: int
    lr: float
    scale_lr: float
    penalty_beta2: float


DIGITS = Setting("digits", 0, 0, 20, 32, 3e-4, 1e-3, 0.99)
FASHION = Setting("fashion-mnist", 10_000, 2_000, 3, 32, 3e-4, 1e-3, 0.99)

LAM = (0.0, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8)
GAMMA = (1e-13, 1e-12, 1e-11, 1e-10, 1e-8)
PENALTIES = ("MaxBin", "InverseScale", "Difference")


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        method: "lam" or the name of a penalty.
        strength: lam or gamma.
        start: "scratch", or "trained": weights trained without quantization.
        wrapped: Whether backward uses 2-bit activations (QuantBackwardWrapper).
    """

    setting: Setting
    method: str
    strength: float
    granularity: str
    start: str
    seed: int
    wrapped: bool = False

    def identity(self) -> dict[str, Any]:
        """Return what tells this run from others, for the results file."""
        return asdict(self)

    def __str__(self) -> str:
        wrapped = ", 2-bit activations" if self.wrapped else ""
        return (
            f"{self.setting.dataset}: {self.method} {self.strength:g}, {self.granularity}, "
            f"{self.start}, seed {self.seed}{wrapped}"
        )


def plan(settings: list[Setting], seeds: int) -> list[Run]:
    """Return all runs; those of the first seed come first."""
    runs = []
    for seed in range(42, 42 + seeds):
        for setting in settings:
            runs += [Run(setting, "lam", lam, "row", "scratch", seed) for lam in LAM]
            if setting.dataset == "digits":
                continue
            for start in ("scratch", "trained"):
                runs += [
                    Run(setting, penalty, gamma, "row", start, seed)
                    for penalty in PENALTIES
                    for gamma in GAMMA
                ]
            runs += [Run(setting, "lam", lam, "row", "trained", seed) for lam in LAM]
            runs += [
                Run(setting, "lam", lam, granularity, "scratch", seed)
                for granularity in ("column", "scalar")
                for lam in LAM[2:]
            ]
            runs += [Run(setting, "lam", lam, "row", "scratch", seed, True) for lam in LAM[2:5]]
    return runs
