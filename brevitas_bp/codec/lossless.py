"""Codecs that give back the very same values in fewer bytes."""

import torch
from torch import Tensor

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.kernels.packing import pack, unpack
from brevitas_bp.kernels.reference import to_buckets


class BitMask(Codec):
    """Bool tensors, 1 bit an element (8 in a byte, planar)."""

    name = "bit mask"

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Packs a bool tensor."""
        layout = TensorLayout.of(x)
        return Packed(self, (_pack_bits(layout.flatten(x)),), layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        """The bool tensor."""
        bits = unpack_bits(packed.tensors[0], packed.layout.numel)
        return packed.layout.restore_flat(bits.to(packed.layout.dtype))

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return -(-layout.numel // 8)


class PositiveMask(BitMask):
    """The mask ``not x <= 0`` of a float tensor, decoded as 0 and 1.

    All that ReLU's backward asks of its saved output, so the gradient stays exact; it lets the
    gradient through at NaN, as autograd does.
    """

    name = "positive mask"

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Packs ``not x <= 0``."""
        layout = TensorLayout.of(x)
        return Packed(self, (_pack_bits(~(layout.flatten(x) <= 0)),), layout, None, where)


class NarrowInt(Codec):
    """Integer tensors in the narrowest integer dtype that holds their range.

    Reads the range, which would synchronise a device: for CPU tensors.
    """

    name = "narrowed"

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Casts to uint8, int16 or int32 where the values allow."""
        layout = TensorLayout.of(x)
        flat = layout.flatten(x)
        lo, hi = (int(v) for v in flat.aminmax()) if flat.numel() else (0, 0)
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
            info = torch.iinfo(dtype)
            if info.min <= lo and hi <= info.max and info.bits < torch.iinfo(x.dtype).bits:
                return Packed(self, (flat.to(dtype),), layout, None, where)
        return Packed(self, (flat.clone(),), layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        """The integers in their own dtype."""
        return packed.layout.restore_flat(packed.tensors[0].to(packed.layout.dtype))


def _pack_bits(flat: Tensor) -> Tensor:
    return pack(to_buckets(flat.to(torch.uint8), None), 1).view(-1)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """Bits of a packed mask as uint8 [numel]."""
    return unpack(packed.view(1, -1), 1, packed.numel() * 8).view(-1)[:numel]
