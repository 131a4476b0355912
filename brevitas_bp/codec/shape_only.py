"""Codecs that store no values, for tensors whose shape is all that backward asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import final

import torch
from torch import Tensor

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.integrity import TensorType
from brevitas_bp.codec.layout import TensorLayout


@final
@dataclass(frozen=True)
class ShapeOnly(Codec):
    """Stores only shape, strides, dtype and device; decodes to uninitialised memory.

    It suits tensors that backward never reads. Measured with PyTorch 2.13 on CPU, with NaN as values:

    ================================================ =============================================
    operation                                        saved tensor that is not read
    ================================================ =============================================
    max_pool*, adaptive_max_pool*,                   the input (float); the indices are read
    fractional_max_pool*
    avg_pool*, adaptive_avg_pool* (but to size 1:    the input
    a mean, which saves nothing), interpolate "area"
    pad "reflect" and "replicate"                    the input
    gather, take, take_along_dim, masked_select,     the input; the index or mask is read
    cummax, cummin
    nll_loss                                         the input; with reduction "sum" or "none" the
                                                     0-d total weight too; targets and weight are read
    grid_sample, whose grid needs no gradient        the input; the grid is read
    rrelu in training                                the input (in place: the output); noise is read
    rrelu in evaluation                              the noise; input (output) has a region
    sgn                                              both
    ================================================ =============================================

    The 1-d poolings save tensors with a dimension of 1 before the last. Other interpolation and padding,
    pixel_shuffle, unfold, fold, expand, repeat, roll, flip, cat, sum and mean save nothing.
    """

    lossy = False
    name: str = "shape only"

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Stores no tensor."""
        return Packed(self, (), TensorLayout.of(x), None, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns uninitialised memory, which must not be read."""
        layout = packed.layout
        return torch.empty_strided(
            layout.shape, layout.stride, dtype=layout.dtype, device=layout.device)

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        return []

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return 0


@final
@dataclass(frozen=True)
class Zeros(Codec):
    """Stores only shape, dtype and device; decodes to zeros.

    It suits the mean of a norm whose input is stored as its deviation from the mean.
    """

    lossy = False
    name: str = "not kept"

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Stores no tensor."""
        return Packed(self, (), TensorLayout.of(x), None, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns zeros."""
        layout = packed.layout
        return torch.empty_strided(
            layout.shape, layout.stride, dtype=layout.dtype, device=layout.device).zero_()

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        return []

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return 0


@lru_cache(maxsize=1)
def zeros() -> Zeros:
    """Returns the codec that decodes to zeros."""
    return Zeros()


@lru_cache(maxsize=1)
def shape_only() -> ShapeOnly:
    """Returns the codec that stores no values and decodes to uninitialised memory."""
    return ShapeOnly()
