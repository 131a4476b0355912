"""Streaming moments of gradients: no list of gradients is kept."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Running:
    """Mean of tensors, and the sum of their squared distances from the mean (Welford, 1962)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.spread = 0.0

    def add(self, x: Tensor) -> None:
        self.count += 1
        delta = x - self.mean
        self.mean = self.mean + delta / self.count
        self.spread += float((delta * (x - self.mean)).sum())


@dataclass(frozen=True)
class Facts:
    """Sums over the elements of a parameter. They add up over parameters."""

    elements: int
    batches: int
    size: float
    drift: float
    along: float
    variance: float
    sampling: float


class Moments:
    """Streaming moments of one parameter's gradients, in float64."""

    def __init__(self) -> None:
        self.exact = Running()
        self.variance = 0.0
        self.drift: Tensor | float = 0.0

    def start(self, exact: Tensor) -> None:
        """Starts the next batch, given its exact gradient."""
        self.now = real(exact)
        self.exact.add(self.now)
        self.differences = Running()

    def add(self, gradient: Tensor) -> tuple[float, float, float]:
        """Adds a compressed gradient g~ of this batch.

        Returns ``|g|^2``, ``<g~ - g, g>`` and ``|g~ - g|^2``.
        """
        difference = real(gradient) - self.now
        self.differences.add(difference)
        products = (self.now * self.now, difference * self.now, difference * difference)
        size, along, distance = (float(p.sum()) for p in products)
        return size, along, distance

    def finish(self) -> None:
        """Ends the batch."""
        self.variance += self.differences.spread / (self.differences.count - 1)
        self.drift = self.drift + self.differences.mean

    def facts(self) -> Facts:
        batches, mean = self.exact.count, torch.as_tensor(self.exact.mean)
        drift = torch.as_tensor(self.drift) / batches
        return Facts(
            mean.numel(), batches, float(mean.square().sum()), float(drift.square().sum()),
            float((drift * mean).sum()), self.variance / batches,
            self.exact.spread / (batches - 1) if batches > 1 else math.nan)


class Cosines:
    """Cosine of every draw with the exact gradient, for any set of parameters."""

    def __init__(self) -> None:
        self.draws: list[list[tuple[float, float, float]]] = []

    def add(self, products: list[tuple[float, float, float]]) -> None:
        self.draws.append(products)

    def mean(self, parameters: Sequence[int]) -> float:
        products = torch.tensor(self.draws, dtype=torch.float64)[:, parameters].sum(1)
        size, along, distance = products.unbind(1)
        lengths = (size * (size + 2 * along + distance).clamp_min(0)).sqrt()
        return float(((size + along) / lengths.clamp_min(torch.finfo(torch.float64).tiny)).mean())


def real(gradient: Tensor) -> Tensor:
    """Returns a gradient as dense real numbers in float64."""
    dense = gradient if gradient.layout is torch.strided else gradient.to_dense()
    return (torch.view_as_real(dense) if dense.is_complex() else dense).detach().double()
