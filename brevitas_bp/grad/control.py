"""What the layers of one wrapper of gradients share."""

import copy
from typing import Any

import torch.distributed as dist

from brevitas_bp.backward.noise import Noise
from brevitas_bp.format.random import derive
from brevitas_bp.grad.quantizer import register_owner

WHERE = "brevitas_bp.grad.QuantGradientWrapper"
# A wrapper of saved tensors with the same seed must not draw the same noise.
_GRADIENTS = 0x67726164


class Control:
    """The noise of a wrapper, and whether gradients are rounded at all.

    Args:
        noise: the wrapper's seeds.
        rank: of this process; None asks ``torch.distributed``.

    Attributes:
        only: None: all layers round. Otherwise the names of those that do.
    """

    def __init__(self, noise: Noise, rank: int | None = None) -> None:
        self.noise = noise
        self.rank = rank
        self.only: frozenset[str] | None = None
        self.key = register_owner(self)

    @classmethod
    def seeded(cls, seed: int | None, rank: int | None) -> "Control":
        """Returns a control whose noise follows from a seed."""
        return cls(Noise(None if seed is None else derive(seed, _GRADIENTS)), rank)

    def next_seed(self) -> int:
        """Returns the next seed of this process."""
        rank = self.rank
        if rank is None:
            # Layers that work on DTensors are refused, so no process holds a copy of another's rows.
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return self.noise.stream.next(rank)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Control":
        other = Control(copy.deepcopy(self.noise, memo), self.rank)
        other.only = self.only
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {"noise": self.noise, "rank": self.rank, "only": self.only}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.key = register_owner(self)
