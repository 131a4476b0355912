"""Codecs that store only what another stored tensor does not tell.

NOTE [ Given what is stored already ]

1. A ReLU stores which of its outputs are positive. The next layer saves the output itself. Its zeros
   are known, so its codec may decode them to anything. They are filled before the encode, which shrinks
   the range and the energy of their bucket. After the decode they are multiplied by the mask.
2. SiLU and GELU store their derivative, which nearly determines their output. The next layer's codec
   stores the difference from a prediction (:mod:`~brevitas_bp.activations.predictions`).
3. Both leave the bytes as they are, but for one bit for each chunk. The gradient stays unbiased: the
   prediction is a fixed function of codes that are stored when the difference is rounded, and whatever
   was predicted, the expected value of the decoded difference is the difference. So the two roundings
   are also uncorrelated, and may be multiplied.
4. In no chunk does the prediction enlarge the range. Otherwise the chunk is stored as it is.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from brevitas_bp.activations.predictions import Prediction
from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.integrity import TensorType, refuse
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.wrapping import WrappingCodec
from brevitas_bp.format.arithmetic import compute_dtype, to_finite
from brevitas_bp.format.differences import CHUNK, chunk_count
from brevitas_bp.format.masks import mask_nbytes
from brevitas_bp.kernels import dispatch


class _Given(WrappingCodec):
    """What codecs share that take something else for given."""

    decodes_anew = True

    def without_units(self, packed: Packed) -> Packed:
        # What ``inner`` decodes is not the tensor.
        return packed

    def is_finer_than(self, other: Codec) -> bool:
        return self.inner.is_finer_than(other)

    def tensor_types(self, packed: Packed) -> Sequence[TensorType] | None:
        stored: Packed = packed.facts
        if stored.layout.numel != packed.layout.numel:
            refuse(packed, f"{packed.layout.numel} elements", stored.layout)
        return stored.codec.tensor_types(stored)

    def _encode(self, flat: Tensor, layout: TensorLayout, x: Tensor, seed: int, where: str) -> Packed:
        """Stores ``flat`` in place of ``x``, in the layout of ``x``."""
        stands_in = replace(layout, dtype=flat.dtype).restore_flat(flat)
        return self.inner.encode(stands_in, seed=seed, where=where)

    def _decode(self, packed: Packed) -> Tensor:
        """Returns what ``inner`` stored, flat, in memory that may be written to."""
        stored = self.stored_in(packed)
        values = stored.layout.flatten(stored.decode()).to(compute_dtype(packed.layout.dtype))
        return values if stored.codec.decodes_anew else values.clone()


@final
class MaskedCodec(_Given):
    """Stores the output of a ReLU, given the mask of its positive elements.

    Args:
        mask: the stored mask.
        row: elements of a row (:mod:`~brevitas_bp.format.differences`); None: no filling.
    """

    def __init__(self, inner: Codec, mask: Packed, row: int | None) -> None:
        super().__init__(inner)
        self.mask, self.row = mask, row
        self.name = f"{inner.name}, given the mask"

    def around(self, inner: Codec) -> Codec:
        return MaskedCodec(inner, self.mask, self.row)

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Fills the zeros, and stores the rest; stores all if elements outside of the mask are not 0.

        The last stored tensor tells which, uint8 [1].
        """
        layout = TensorLayout.of(x)
        flat = layout.flatten(x.detach())
        # The tensor may have changed since the mask was made, in a way that its version does not tell.
        strays = dispatch.find_strays(flat, self.mask.tensors[0])
        if self.row is None:
            stored = self.inner.encode(x, seed=seed, where=where)
        else:
            stored = self._encode(
                dispatch.fill_zeros(flat, self.row, strays), layout, x, seed, where)
        return Packed(self, (*stored.tensors, strays), layout, stored, where)

    def counted(self, packed: Packed) -> Tensor | None:
        # Without rows, ``inner`` may have another order.
        return None if self.row is None else packed.tensors[-1].bool() | dispatch.unpack_select(
            self.mask.checked()[0], packed.layout.numel, 0, 1, torch.bool)

    def decode(self, packed: Packed) -> Tensor:
        """Returns the tensor, with exact zeros."""
        layout = packed.layout
        mask = self.mask.checked()[0]
        if mask.numel() != mask_nbytes(layout.numel):
            refuse(packed, f"a mask of {mask_nbytes(layout.numel)} bytes", f"{mask.numel()} bytes")
        values = dispatch.mask_(self._decode(packed), mask, packed.tensors[-1])
        return layout.restore_flat(values.to(layout.dtype))

    def tensor_types(self, packed: Packed) -> Sequence[TensorType] | None:
        types = super().tensor_types(packed)
        return None if types is None else [*types, TensorType.flat(1)]

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        least = self.inner.stored_nbytes(layout)
        return None if least is None else least + 1


@final
class DifferenceCodec(_Given):
    """Stores the output of an activation function, given its stored derivative.

    Halves are stored as differences in float32, so that only ``inner`` rounds them.

    Args:
        inner: stores the difference.
        derivative: the stored derivative.
        prediction: predicts the output from the derivative.
        row: elements of a row (:mod:`~brevitas_bp.format.differences`).
        chunk: elements of a chunk. No bucket of ``inner`` lies in two chunks.
    """

    def __init__(
            self, inner: Codec, derivative: Packed, prediction: Prediction, row: int,
            chunk: int = CHUNK) -> None:
        super().__init__(inner)
        self.derivative, self.prediction = derivative, prediction
        self.row, self.chunk = row, chunk
        self.name = f"{inner.name}, given the derivative"

    def around(self, inner: Codec) -> Codec:
        return DifferenceCodec(inner, self.derivative, self.prediction, self.row, self.chunk)

    def beside(self, derivative: Packed) -> "DifferenceCodec":
        """Returns this codec for a derivative that is stored with another codec."""
        return DifferenceCodec(self.inner, derivative, self.prediction, self.row, self.chunk)

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Subtracts the prediction, and stores the rest."""
        layout = TensorLayout.of(x)
        flat = layout.flatten(x.detach()).to(compute_dtype(x.dtype))
        difference, used = dispatch.subtract_prediction(
            flat, self._derivatives(flat.dtype), self.prediction, self.row,
            self.inner.factors(self.row), self.chunk)
        stored = self._encode(difference, layout, x, seed, where)
        return Packed(self, (*stored.tensors, dispatch.pack_bits(used)), layout, stored, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns the sum of prediction and difference."""
        layout, values = packed.layout, self._decode(packed)
        derivatives = self._derivatives(values.dtype)
        if derivatives.numel() != layout.numel:
            refuse(packed, f"{layout.numel} derivatives", derivatives.numel())
        used = dispatch.unpack_select(
            packed.tensors[-1], self._chunks(layout), 0, 1, packed.tensors[-1].dtype).bool()
        dispatch.add_prediction_(
            values, derivatives, self.prediction, self.row, used, self.chunk)
        # The noise of a value near the largest number may lie beyond it.
        return layout.restore_flat(to_finite(values, layout.dtype))

    def tensor_types(self, packed: Packed) -> Sequence[TensorType] | None:
        types = super().tensor_types(packed)
        return None if types is None else [
            *types, TensorType.flat(mask_nbytes(self._chunks(packed.layout)))]

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        least = self.inner.stored_nbytes(layout)
        return None if least is None else least + mask_nbytes(self._chunks(layout))

    def _chunks(self, layout: TensorLayout) -> int:
        return chunk_count(layout.numel, self.row, self.chunk)

    def _derivatives(self, dtype: torch.dtype) -> Tensor:
        """Returns the decoded derivatives in the order of memory, in memory that may be written to."""
        decoded = self.derivative.decode()
        flat = TensorLayout.of(decoded).flatten(decoded).to(dtype)
        return flat if self.derivative.codec.decodes_anew else flat.clone()
