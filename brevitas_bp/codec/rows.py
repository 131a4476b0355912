"""Codecs whose buckets end with the rows of a tensor.

NOTE [ Rows ]
Backward multiplies all elements of a row (the features of a token, the pixels of an image) by the same
gradients. The values of one row may be any number of times larger than those of another. The rounding
error of an element grows with the range of its bucket. So a bucket with elements of two rows would round
the smaller row at the scale of the larger row. The gradient of the smaller row could then be wrong by
any factor. See docs/bounds.md, also for rows so short that one bucket holds several of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from brevitas_bp.codec import derived
from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.integrity import TensorType, refuse
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.wrapping import WrappingCodec


class Rows(NamedTuple):
    """The rows of a tensor.

    Attributes:
        length: elements of a row.
        last: elements of the last dimension; a row is a multiple or a part of it.
        order: dimensions from the slowest to the fastest, such that rows are consecutive elements; None:
            rows are consecutive in memory.
    """

    length: int
    last: int
    order: tuple[int, ...] | None = None


class ReorderedCodec(WrappingCodec):
    """Stores a tensor as a contiguous tensor with its dimensions in another order.

    Args:
        inner: stores the reordered tensor.
        order: order of the dimensions.
    """

    def __init__(self, inner: Codec, order: tuple[int, ...]) -> None:
        super().__init__(inner)
        self.order = order

    def around(self, inner: Codec) -> Codec:
        return ReorderedCodec(inner, self.order)

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Copies ``x`` in the new order, and stores the copy."""
        base = TensorLayout.base(x.detach()).resolve_neg()
        stored = self.inner.encode(
            base.permute(self.order).contiguous(), seed=seed, where=where)
        return Packed(self, stored.tensors, TensorLayout.of(x), stored, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns the tensor in its own memory order."""
        values = self.stored_in(packed).decode()
        return packed.layout.restore(
            values.permute([self.order.index(d) for d in range(len(self.order))]))

    def tensor_types(self, packed: Packed) -> Sequence[TensorType] | None:
        stored, layout = packed.facts, packed.layout
        shape = tuple(layout.base_shape[d] for d in self.order)
        if (tuple(stored.layout.shape), stored.layout.dtype) != (shape, layout.dtype):
            refuse(packed, f"{layout.dtype} {list(shape)}", stored.layout)
        return stored.codec.tensor_types(stored)


def in_rows(codec: Codec, rows: Rows) -> Codec:
    """Returns ``codec`` with buckets that end with each row, made once; itself without buckets."""
    return derived.rows.get(codec, rows, lambda: _in_rows(codec, rows))


def _in_rows(codec: Codec, rows: Rows) -> Codec:
    made = codec.in_rows(rows.length, rows.last)
    return made if made is codec or rows.order is None else ReorderedCodec(made, rows.order)
