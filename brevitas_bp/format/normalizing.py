"""Values in units of their own statistic: ``(x - shift) * scale`` before encoding, the inverse after.

A norm multiplies a rounding of its input by its inverse deviation, which differs from row to row or
from channel to channel. Encoded are therefore the normalized values, all of one scale. The compiled CPU
kernels do this while they encode and decode; the torch operations here define every bit.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from brevitas_bp.format.arithmetic import compute_dtype


class Affine(NamedTuple):
    """An affine map with one pair of numbers for each statistic.

    Element ``i`` of a flat tensor belongs to statistic ``i // inner % K``.

    Attributes:
        scale: [K], contiguous, in the dtype computed in.
        shift: [K], the same; None: zeros.
        inner: consecutive elements of one statistic.
        largest: a scale that reaches it counts as 0.
        divides: values are multiplied by ``1 / scale``.
    """

    scale: Tensor
    shift: Tensor | None
    inner: int
    largest: float = math.inf
    divides: bool = False

    def multipliers(self) -> Tensor:
        """What values are multiplied by [K]."""
        factors = self.scale.reciprocal() if self.divides else self.scale
        return torch.where(self.scale >= self.largest, 0, factors)


def normalize(flat: Tensor, affine: Affine) -> Tensor:
    """``(x - shift) * scale`` of a flat tensor, in the dtype computed in."""
    x = flat.to(compute_dtype(flat.dtype)).view(-1, len(affine.scale), affine.inner)
    centred = x * 1 if affine.shift is None else x - affine.shift.view(-1, 1)
    return centred.mul_(affine.multipliers().view(-1, 1)).view(-1)


def denormalize(flat: Tensor, affine: Affine, dtype: torch.dtype) -> Tensor:
    """``y * scale + shift`` of decoded values, which are in the dtype computed in, as ``dtype``."""
    y = flat.view(-1, len(affine.scale), affine.inner) * (
        affine.multipliers().view(-1, 1))
    if affine.shift is not None:
        y += affine.shift.view(-1, 1)
    limit = torch.finfo(dtype).max
    return y.clamp_(-limit, limit).to(dtype).view(-1)
