"""Stores float tensors of two values, such as masks of attention: 1 bit per element."""

from collections.abc import Sequence
from functools import lru_cache
from typing import final

import torch
from torch import Tensor

from brevitas_bp.codec.base import FLOATS, Codec, Packed
from brevitas_bp.codec.integrity import TensorType, refuse
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.format.masks import INTEGERS, mask_nbytes
from brevitas_bp.kernels import dispatch


@final
class TwoValuedCodec(Codec):
    """Restores every bit of a tensor with at most two different values; keeps any other tensor.

    Additive masks hold 0 and ``-inf``, or 0 and the lowest number. Encoding looks at all elements. On a
    GPU it waits for the result, so it keeps the tensor while a CUDA graph is captured.

    A tensor with NaN, or with more values, is stored as it is. The break-even rule then keeps it.

    >>> mask = torch.tensor([[0.0, float("-inf")], [0.0, 0.0]])
    >>> packed = TwoValuedCodec().encode(mask)
    >>> packed.decode(), packed.nbytes
    (tensor([[0., -inf],
            [0., 0.]]), 1)
    """

    name = "mask of two values"
    restores = FLOATS
    lossy = False

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Packs which elements have the second value."""
        layout = self.layout_of(x, where)
        flat = layout.flatten(x.detach())
        with torch.no_grad():
            values = _two_values(flat)
            if values is None:
                return Packed(self, (flat.clone(),), layout, None, where)
            second = flat.view(INTEGERS[flat.element_size()]) == values[1]
        numbers = torch.tensor(values, dtype=INTEGERS[flat.element_size()], device="cpu").view(x.dtype)
        return Packed(self, (dispatch.pack_bits(second),), layout, tuple(numbers.tolist()), where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns the tensor."""
        layout = packed.layout
        if packed.facts is None:
            return layout.restore_flat(packed.tensors[0])
        second = dispatch.unpack_select(packed.tensors[0], layout.numel, 0, 1, torch.bool)
        # Tensors without dimensions keep the sign of a zero.
        low, high = (
            torch.tensor(value, dtype=layout.dtype, device=layout.device) for value in packed.facts)
        return layout.restore_flat(torch.where(second, high, low))

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        layout = packed.layout
        if layout.dtype not in FLOATS:
            refuse(packed, f"a tensor of {FLOATS}", layout.dtype)
        if packed.facts is None:
            return [TensorType.flat(layout.numel, layout.dtype)]
        return [TensorType.flat(mask_nbytes(layout.numel))]

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return mask_nbytes(layout.numel)


@lru_cache(maxsize=1)
def two_valued() -> TwoValuedCodec:
    """Returns the codec; operations share an encoding only if their codec is one object."""
    return TwoValuedCodec()


def _two_values(flat: Tensor) -> tuple[int, int] | None:
    """Returns the bits of the two values, as integers; None if there are more, or NaN, or none."""
    if flat.numel() == 0 or (flat.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    bits = flat.view(INTEGERS[flat.element_size()])
    first, second = bits.aminmax()
    known = ((bits == first) | (bits == second)).all() & ~flat.isnan().any()
    # One transfer from the device.
    low, high, sound = torch.stack((first.long(), second.long(), known.long())).tolist()
    return (low, high) if sound else None
