"""The training recipe: which parameters decay, and the learning rate of every step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["cosine", "onecycle", "step", "constant"]


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> AdamW:
    """Return AdamW with decoupled weight decay; norms and biases (1-d) do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=lr)


@dataclass(frozen=True)
class LearningRate:
    """Factor on the base learning rate. It depends on the step only, so a resumed run is exact.

    `cosine`, `step` and `constant` start with `warmup` linear steps. `onecycle` rises along a cosine
    from 1/25 over `warmup` steps (over 30 % of the run if `warmup` is 0), then falls along a cosine to
    1/250000. It changes the learning rate only, not the betas. Attributes: total: Steps of the whole
    run. warmup: Steps of the warm-up. gamma: Factor of the `step` schedule, applied after one half and
    three quarters.
    """

    kind: Schedule
    total: int
    warmup: int
    gamma: float = 0.1

    def __call__(self, step: int) -> float:
        """Return the factor at `step`, counted from 0."""
        if self.kind == "onecycle":
            return self._onecycle(step)
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "cosine":
            return _cosine(1.0, 0.0, self._progress(step, self.warmup))
        if self.kind == "step":
            return self.gamma ** sum(step >= part * self.total for part in (0.5, 0.75))
        return 1.0

    def _onecycle(self, step: int) -> float:
        peak = self.warmup or max(1, round(0.3 * self.total))
        if step < peak:
            return _cosine(1 / 25, 1.0, step / peak)
        return _cosine(1.0, 1 / 25e4, self._progress(step, peak))

    def _progress(self, step: int, start: int) -> float:
        return (step - start) / max(1, self.total - start)


def _cosine(start: float, end: float, progress: float) -> float:
    """Interpolate from `start` to `end` along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def make_schedule(optimizer: AdamW, learning_rate: LearningRate) -> LambdaLR:
    """Return a schedule that applies `learning_rate` once per step."""
    return LambdaLR(optimizer, learning_rate)
