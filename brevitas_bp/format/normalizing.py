"""Values in units of their own statistic: ``(x - shift) * scale`` before encoding, the inverse after.

A norm multiplies a rounding error of its input by its inverse deviation, which differs between rows or
between channels. Encoding therefore takes the normalized values, which all have one scale. The compiled
CPU kernels do this while they encode and decode. The torch operations here define every bit.
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
        scale: [K], contiguous, in the compute dtype.
        shift: [K], contiguous, in the compute dtype; None means zeros.
        inner: consecutive elements of one statistic.
        largest: a scale that reaches this bound counts as 0.
        divides: values are multiplied by ``1 / scale``.
    """

    scale: Tensor
    shift: Tensor | None
    inner: int
    largest: float = math.inf
    divides: bool = False

    def multipliers(self) -> Tensor:
        """Returns the factors [K] that values are multiplied by."""
        factors = self.scale.reciprocal() if self.divides else self.scale
        return torch.where(self.scale >= self.largest, 0, factors)


def normalize(flat: Tensor, affine: Affine) -> Tensor:
    """Returns ``(x - shift) * scale`` of a flat tensor, in the compute dtype."""
    x = flat.to(compute_dtype(flat.dtype)).view(-1, len(affine.scale), affine.inner)
    centred = x * 1 if affine.shift is None else x - affine.shift.view(-1, 1)
    return centred.mul_(affine.multipliers().view(-1, 1)).view(-1)


def denormalize(flat: Tensor, affine: Affine, dtype: torch.dtype) -> Tensor:
    """Returns ``y * scale + shift`` as ``dtype``; decoded values ``y`` are in the compute dtype."""
    y = flat.view(-1, len(affine.scale), affine.inner) * (
        affine.multipliers().view(-1, 1))
    if affine.shift is not None:
        y += affine.shift.view(-1, 1)
    limit = torch.finfo(dtype).max
    return y.clamp_(-limit, limit).to(dtype).view(-1)
