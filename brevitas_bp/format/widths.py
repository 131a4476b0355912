"""Chooses the buckets that take the second bit width: recomputed from the seed, never stored.

The choice is systematic sampling. Bucket ``i`` of ``n`` owns slot ``(multiplier * i + shift) mod n``.
The bucket is mixed if its slot lies below ``mixed = floor(p * n + U)``. The shift is uniform, so every
bucket is mixed with probability exactly ``p``. The seed fixes the number of mixed buckets.

The slot is also the place of the bucket among the packed bytes, mixed buckets first. No flag bit,
prefix sum or device synchronisation is therefore needed. The multiplier, near ``n`` times the golden
ratio, spreads the mixed buckets evenly over the tensor.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from brevitas_bp.format.random import derive, unit_float
from brevitas_bp.format.spec import MixPer


@lru_cache(maxsize=4096)
def _spreading_multiplier(n: int) -> tuple[int, int]:
    """Returns a multiplier coprime to ``n``, near its golden section, and its inverse modulo ``n``."""
    if n <= 2:
        return 1, 1
    candidate = max(1, round(n * (math.sqrt(5) - 1) / 2))
    while math.gcd(candidate, n) != 1:
        candidate += 1
    return candidate % n, pow(candidate, -1, n)


@dataclass(frozen=True)
class WidthLayout:
    """The two-width layout of ``n`` buckets.

    Attributes:
        n: number of buckets.
        mixed: number of buckets with the second width; they own slots ``0 .. mixed - 1``.
        multiplier: factor of the map from buckets to slots.
        inverse: inverse of ``multiplier`` modulo ``n``.
        shift: shift of the map from buckets to slots.
    """

    n: int
    mixed: int
    multiplier: int = 1
    inverse: int = 1
    shift: int = 0

    @classmethod
    def draw(cls, n: int, probability: float, per: MixPer, seed: int) -> "WidthLayout":
        """Draws the layout from ``seed`` (a seed of the stream ``WIDTHS``)."""
        unit = unit_float(derive(seed, 0))
        if per == "tensor":
            return cls(n, n if unit < probability else 0)
        multiplier, inverse = _spreading_multiplier(n)
        mixed = min(n, math.floor(probability * n + unit))
        return cls(n, mixed, multiplier, inverse, derive(seed, 1) % max(n, 1))

    def runs(self) -> list[tuple[int, int, int]]:
        """Returns the runs of slots of one width, in payload order: (first slot, stop, which width).

        >>> WidthLayout(5, 2).runs()
        [(0, 2, 1), (2, 5, 0)]
        """
        runs = [(0, self.mixed, 1), (self.mixed, self.n, 0)]
        return [run for run in runs if run[0] < run[1]]

    def slots(self, device: torch.device | str = "cpu") -> Tensor:
        """Returns the slot of every bucket, int64 [n]."""
        buckets = torch.arange(self.n, dtype=torch.int64, device=device)
        return (buckets * self.multiplier + self.shift).remainder_(max(self.n, 1))

    def is_mixed(self, device: torch.device | str = "cpu") -> Tensor:
        """Returns whether each bucket has the second width, bool [n]."""
        return self.slots(device) < self.mixed

    def buckets(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """Returns the buckets that own slots ``start .. stop - 1``, int64."""
        slots = torch.arange(start, stop, dtype=torch.int64, device=device)
        return ((slots - self.shift) * self.inverse).remainder_(max(self.n, 1))
