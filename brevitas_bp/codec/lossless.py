"""Codecs that restore exactly the same values: a copy, and codecs that store fewer bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.graph_forms import GraphForm, GraphTensor, MaskForm
from brevitas_bp.codec.integrity import TensorType, refuse
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.format.masks import mask_nbytes
from brevitas_bp.kernels import dispatch

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Copy(Codec):
    """Stores an exact copy, so that the larger memory that the tensor is part of can be freed."""

    lossy = False
    keeps_sign = True
    name = "exact copy"
    compresses = False

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Copies ``x``."""
        layout = TensorLayout.of(x)
        return Packed(self, (layout.flatten(x.detach()).clone(),), layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns the copy."""
        return packed.layout.restore_flat(packed.tensors[0])

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        return [TensorType.flat(packed.layout.numel, packed.layout.dtype)]


class BitMask(Codec):
    """Stores bool tensors, 1 bit per element (8 in a byte, planar)."""

    restores = (torch.bool,)
    lossy = False
    in_graphs = True
    name = "bit mask"

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Packs a bool tensor."""
        layout = self.layout_of(x, where)
        return Packed(self, (dispatch.pack_bits(layout.flatten(x)),), layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns the bool tensor."""
        layout = packed.layout
        return layout.restore_flat(
            dispatch.unpack_select(packed.tensors[0], layout.numel, 0, 1, layout.dtype))

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        if packed.layout.dtype != torch.bool:
            refuse(packed, "a bool tensor", packed.layout.dtype)
        return [TensorType.flat(mask_nbytes(packed.layout.numel))]

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return mask_nbytes(layout.numel)

    def in_graph(self, x: GraphTensor) -> GraphForm | None:
        return MaskForm(self.name, x.order, x.dtype)


@dataclass(frozen=True)
class NarrowInt(Codec):
    """Stores integer tensors in a narrower integer dtype.

    Without ``dtype``, it takes the narrowest dtype that holds the range of the values. It reads the
    values to find the range, which would synchronise a device. :func:`narrow_to` gets the dtype from the
    shapes instead.

    Attributes:
        dtype: the stored dtype.
        name: shown in reports.
    """

    restores = _INTEGERS
    lossy = False

    dtype: torch.dtype | None = None
    name: str = "narrowed"

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Casts ``x`` to the stored dtype, if that is narrower."""
        layout = self.layout_of(x, where)
        flat = layout.flatten(x)
        dtype = self._stored_dtype(x.dtype, _range_dtype(flat) if self.dtype is None else None)
        return Packed(self, (flat.to(dtype, copy=True),), layout, dtype, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns the integers in their own dtype."""
        return packed.layout.restore_flat(packed.tensors[0].to(packed.layout.dtype))

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        layout, stored = packed.layout, packed.facts
        if layout.dtype not in _INTEGERS or stored != self._stored_dtype(layout.dtype, stored):
            refuse(packed, f"{layout.dtype} stored by {self}", f"a payload of {stored}")
        return [TensorType.flat(layout.numel, stored)]

    def _stored_dtype(self, dtype: torch.dtype, found: torch.dtype | None) -> torch.dtype:
        narrow = self.dtype or found
        return narrow if narrow is not None and narrow.itemsize < dtype.itemsize else dtype

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        narrowest = torch.uint8 if self.dtype is None else self.dtype
        return layout.numel * min(narrowest.itemsize, layout.dtype.itemsize)


@lru_cache(maxsize=256)
def narrow_to(limit: int, *, signed: bool = True) -> NarrowInt:
    """Returns a codec of integers in ``[-limit, limit)``, or in ``[0, limit)`` if not ``signed``.

    It suits the int64 indices of ``index_select``, ``gather``, ``scatter``, ``embedding`` (not signed:
    torch has already refused negative indices) and of indexing. ``limit`` is then the size of the
    indexed dimension. Targets of ``nll_loss`` need ``max(classes, -ignore_index)``.

    >>> narrow_to(256).dtype, narrow_to(256, signed=False).dtype
    (torch.int16, torch.uint8)
    """
    low = -limit if signed else 0
    return NarrowInt(_narrowest(low, limit - 1) or torch.int64)


def _range_dtype(flat: Tensor) -> torch.dtype:
    lo, hi = (int(v) for v in flat.aminmax()) if flat.numel() else (0, 0)
    return _narrowest(lo, hi) or flat.dtype


def _narrowest(lo: int, hi: int) -> torch.dtype | None:
    """Returns the narrowest dtype that holds ``lo .. hi``; None if only int64 does."""
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        info = torch.iinfo(dtype)
        if info.min <= lo and hi <= info.max:
            return dtype
    return None
