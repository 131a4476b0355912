"""Stores which interval of a few-bit table each element lies in, and decodes to derivatives."""

from collections.abc import Sequence
from typing import final

from torch import Tensor

from brevitas_bp.activations.few_bit import FewBitTable
from brevitas_bp.codec.base import FLOATS, Codec, Packed
from brevitas_bp.codec.integrity import TensorType, refuse
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.format.few_bit import few_bit_nbytes
from brevitas_bp.kernels import dispatch


@final
class FewBitCodec(Codec):
    """Encodes an activation's *input*, and decodes to its *derivative*: one constant level per interval.

    Each element takes ``b`` bits. One more byte per 4096 elements marks NaN: a block that holds a NaN
    decodes to NaN, so that a loss scaler still sees it. Infinities get the outermost levels. Nothing is
    random: the gradient has a fixed, biased error, which the table minimises.

    Source: Novikov et al., "Few-bit backward: quantized gradients of activation functions for memory
    footprint reduction", 2022.

    Args:
        table: from :func:`~brevitas_bp.activations.few_bit.few_bit_table` or
            :func:`~brevitas_bp.activations.few_bit.fit_few_bit_table`.

    >>> import torch
    >>> from brevitas_bp.activations.few_bit import few_bit_table
    >>> codec = FewBitCodec(few_bit_table("relu", 1))
    >>> codec.name, codec.encode(torch.tensor([-2.0, 0.0, 3.0])).decode().tolist()
    ('1-bit few-bit relu', [0.0, 0.0, 1.0])
    """

    restores = FLOATS
    decodes_anew = True

    def __init__(self, table: FewBitTable) -> None:
        self.table = table
        self.name = f"{table.bits}-bit few-bit {table.name}"

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Packs the interval indices of ``x``; ``seed`` is not used."""
        layout = self.layout_of(x, where)
        stored = dispatch.encode_few_bit(
            layout.flatten(x), self.table.borders, self.table.bits, self.table.even)
        return Packed(self, stored, layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns the derivatives, in the dtype and layout of the input."""
        payload, flags = packed.tensors
        layout = packed.layout
        return layout.restore_flat(dispatch.decode_few_bit(
            payload, flags, self.table.levels, self.table.bits, layout.numel, layout.dtype))

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        if packed.layout.dtype not in FLOATS:
            refuse(packed, f"a tensor of {FLOATS}", packed.layout.dtype)
        codes, flags = few_bit_nbytes(packed.layout.numel, self.table.bits)
        return [TensorType.flat(codes), TensorType.flat(flags)]

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return sum(few_bit_nbytes(layout.numel, self.table.bits))
