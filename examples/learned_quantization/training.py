"""One training of the dense network of Chinbat (2025), 8.3: raw pixels, 128 hidden units, Adam."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from data import Source, load_dataset
from plan import Run, Setting
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import QuantBackwardWrapper
from brevitas_bp.nn import learned
from brevitas_bp.nn.learned import (
    adam,
    export_integers,
    learn_quantization,
    named_learned_tensors,
    report_integers,
    zipped_nbytes,
)


@cache
def images(setting: Setting, folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images `(N, pixels)` in 0..255, their labels, and the same for test."""
    data = load_dataset(
        setting.dataset,
        Source(folder, limit_train=setting.train_images, limit_test=setting.test_images),
    )
    return (
        data.train.images.flatten(1).float(),
        data.train.labels,
        data.test.images.flatten(1).float(),
        data.test.labels,
    )


def network(pixels: int, seed: int) -> nn.Module:
    """Return the network, with all weights and biases from a normal distribution of deviation 0.05."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, 10))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Return the share of correct predictions."""
    return float((model(x).argmax(1) == labels).float().mean())


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    penalty: learned.Penalty | None,
    setting: Setting,
    folder: Path,
    seed: int,
) -> None:
    """Train the model on shuffled batches."""
    x, labels, _, _ = images(setting, folder)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(setting.epochs):
        for batch in torch.randperm(len(x), generator=generator).split(setting.batch):
            loss = F.cross_entropy(model(x[batch]), labels[batch])
            if penalty is not None:
                loss = loss + penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def trained(setting: Setting, folder: Path, seed: int) -> nn.Module:
    """Return a network trained without quantization."""
    model = network(images(setting, folder)[0].shape[1], seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.lr, eps=1e-7)
    fit(model, optimizer, None, setting, folder, seed)
    return model


class FloatNetworks:
    """Networks trained without quantization, each trained once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._states: dict[tuple[Setting, int], tuple[dict[str, Tensor], float]] = {}

    def __call__(self, setting: Setting, seed: int) -> tuple[dict[str, Tensor], float]:
        """Return the weights and the test accuracy."""
        if (setting, seed) not in self._states:
            model = trained(setting, self._folder, seed)
            _, _, x, labels = images(setting, self._folder)
            self._states[setting, seed] = model.state_dict(), accuracy(model, x, labels)
        return self._states[setting, seed]


def train(run: Run, folder: Path, floats: FloatNetworks) -> dict[str, Any]:
    """Train one network; return its accuracy, its integers and the sizes of its files."""
    setting = run.setting
    x, _, x_test, labels = images(setting, folder)
    state, float_accuracy = floats(setting, run.seed)
    model = network(x.shape[1], run.seed)
    if run.start == "trained":
        model.load_state_dict(state)
    by_ratio = run.method == "lam"
    learn_quantization(
        model, granularity=run.granularity, lam=run.strength if by_ratio else None
    )
    penalty = None if by_ratio else getattr(learned, run.method)(gamma=run.strength)
    optimizer = adam(
        model,
        lr=setting.lr,
        scale_lr=setting.scale_lr,
        scale_betas=None if by_ratio else (0.9, setting.penalty_beta2),
    )
    start = time.perf_counter()
    net = QuantBackwardWrapper(model, seed=run.seed) if run.wrapped else model
    fit(net, optimizer, penalty, setting, folder, run.seed)
    seconds = time.perf_counter() - start
    report, exported = report_integers(model), export_integers(model)
    plain = network(x.shape[1], run.seed)
    plain.load_state_dict(exported.state_dict())
    found, restored = accuracy(model, x_test, labels), accuracy(plain, x_test, labels)
    if found != restored:
        raise AssertionError(f"{run}: accuracy {found}, but {restored} from exported integers")
    floats_now = {
        name: tensor.parameter.detach() for name, tensor in named_learned_tensors(model).items()
    }
    return {
        "accuracy": found,
        "float_accuracy": float_accuracy,
        "distinct": report.pooled.distinct,
        "low": report.pooled.low,
        "high": report.pooled.high,
        "bits": report.pooled.bits,
        "tensors": {row.name: [row.distinct, row.low, row.high] for row in report.tensors},
        "types": {name: str(codes.dtype) for name, codes in exported.integers.items()},
        "zipped_integers": exported.zipped_nbytes(),
        "zipped_floats": zipped_nbytes(floats_now),
        "seconds": round(seconds, 2),
    }
