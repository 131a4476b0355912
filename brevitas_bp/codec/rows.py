"""Buckets that end with a row of the tensor.

NOTE [ Rows ]
Backward multiplies all elements of a row (the features of a token, the pixels of an image) by the same
gradients, and the sizes of rows may differ by any factor. The rounding of an element is as large as the
range of its bucket. So a bucket that held elements of two rows would round the smaller one at the scale
of the larger: its gradient could be wrong by any factor. See docs/bounds.md.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.integrity import Form, refuse
from brevitas_bp.codec.layout import TensorLayout


class Rows(NamedTuple):
    """The rows of a tensor.

    Attributes:
        length: elements of a row.
        last: elements of the last dimension, of which a row is a multiple or a part.
        order: dimensions from the slowest to the fastest, in which rows are consecutive elements; None
            where they are so in memory.
    """

    length: int
    last: int
    order: tuple[int, ...] | None = None


class ReorderedCodec(Codec):
    """Stores a tensor with its dimensions in another order, as a contiguous one.

    Args:
        inner: stores that tensor.
        order: of the dimensions.
    """

    wraps = True

    def __init__(self, inner: Codec, order: tuple[int, ...]) -> None:
        self.inner = inner
        self.order = order
        self.name = inner.name
        self.compresses = inner.compresses

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Copies ``x`` in the new order, and stores the copy."""
        base = TensorLayout.base(x.detach()).resolve_neg()
        stored = self.inner.encode(
            base.permute(self.order).contiguous(), seed=seed, where=where)
        return Packed(self, stored.tensors, TensorLayout.of(x), stored, where)

    def decode(self, packed: Packed) -> Tensor:
        """The tensor, in its own order in memory."""
        # Through what is stored now: it is compared with what was.
        values = packed.facts.with_tensors(packed.tensors).decode()
        return packed.layout.restore(
            values.permute([self.order.index(d) for d in range(len(self.order))]))

    def forms(self, packed: Packed) -> Sequence[Form] | None:
        stored, layout = packed.facts, packed.layout
        shape = tuple(layout.base_shape[d] for d in self.order)
        if (tuple(stored.layout.shape), stored.layout.dtype) != (shape, layout.dtype):
            refuse(packed, f"{layout.dtype} {list(shape)}", stored.layout)
        return stored.codec.forms(stored)

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return self.inner.stored_nbytes(layout)


# Hooks share an encoding by the identity of its codec, so each is made once.
_made: WeakKeyDictionary[Codec, dict[Rows, Codec | None]] = WeakKeyDictionary()
_UNKNOWN: Any = object()
# Networks have few lengths of rows; inputs of ever new sizes would add one after another.
_MOST = 1024


def in_rows(codec: Codec, rows: Rows) -> Codec:
    """``codec`` with buckets that end with each row; itself where it has no buckets."""
    made = _made.get(codec)
    if made is None or len(made) > _MOST:
        made = _made[codec] = {}
    found = made.get(rows, _UNKNOWN)
    if found is None:
        return codec
    if found is _UNKNOWN:
        # A value that holds its key would never be freed: what is made holds the codec's parts.
        found = codec.in_rows(rows.length, rows.last)
        if found is codec:
            # Not the codec itself, which would hold itself.
            made[rows] = None
            return codec
        if rows.order is not None:
            found = ReorderedCodec(found, rows.order)
        made[rows] = found
    return found
