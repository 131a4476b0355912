"""A codec for tensors that backward computes from other stored tensors.

NOTE [ Computed from what is stored already ]

Two operations often save tensors of which one is a function of the other. Then one of them is stored,
and backward computes the other.

1. *Output of a norm.* A layer after the norm saves its output ``y = scale * x^ + shift``, the norm
   itself saves its input. Only ``y`` is stored. Backward of the norm gets its input from
   ``(y - shift) / scale``, which is linear in ``y``. So a rounding whose mean is zero stays one.
2. *Products.* The product of two stored factors is not stored when the next layer saves it. The
   roundings of the factors are independent, so the mean of the product of the decoded factors is the
   product of the factors.
3. *Copies.* Autocast and layers copy a tensor before they save it: in another dtype, or in the order of
   memory. One rounding serves the tensor and all of its copies.

A layer's input computed so must meet its own rounding nowhere else in backward. So the layer's weight
must be a parameter, or a function of one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import final

from torch import Tensor

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.integrity import TensorType
from brevitas_bp.codec.layout import TensorLayout


@final
class ComputedCodec(Codec):
    """Stores nothing of a tensor but its layout. See NOTE [ Computed from what is stored already ].

    Args:
        name: says in reports from what the tensor is computed.
        compute: what ``source`` decodes to -> the tensor, in any dtype and memory layout. Without a
            source, it takes nothing.
        source: the stored tensor. Its bytes count here too; a report of memory counts them once. None:
            the bytes count elsewhere.
        owned: further tensors that are kept for this tensor alone.
    """

    computes = True

    def __init__(
            self, name: str, compute: Callable[..., Tensor], source: Packed | None = None,
            owned: tuple[Tensor, ...] = ()) -> None:
        self.name, self.compute, self.source, self.owned = name, compute, source, owned
        self.wraps = source is not None
        self.owns = source is None or source.codec.owns

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Notes the layout of ``x``, which must be what ``compute`` returns but for roundings."""
        return self.noted(TensorLayout.of(x), where)

    def noted(self, layout: TensorLayout, where: str = "") -> Packed:
        """Returns the ``Packed`` of a tensor of this layout."""
        source = self.source
        tensors = () if source is None else source.tensors
        return Packed(self, (*tensors, *self.owned), layout, source, where)

    def decode(self, packed: Packed) -> Tensor:
        """Computes the tensor."""
        source, layout = packed.facts, packed.layout
        values = self.compute() if source is None else self.compute(
            source.with_tensors(packed.tensors).decode())
        return layout.restore(values.reshape(layout.shape).to(layout.dtype))

    def is_finer_than(self, other: Codec) -> bool:
        return self.source is not None and self.source.codec.is_finer_than(other)

    def tensor_types(self, packed: Packed) -> Sequence[TensorType] | None:
        of_source = [] if self.source is None else self.source.codec.tensor_types(self.source)
        return None if of_source is None else [
            *of_source, *(TensorType(tuple(t.shape), t.dtype) for t in self.owned)]

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        """Returns the bytes that are kept for this tensor alone."""
        return sum(t.nbytes for t in self.owned)


def constant(x: Tensor) -> Callable[[], Tensor]:
    """Returns a function that returns ``x``; it can be pickled."""
    return partial(_same, x)


def _same(x: Tensor) -> Tensor:
    return x
