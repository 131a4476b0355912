"""Base of codecs that change the order or the units of a tensor, and leave bytes to another codec."""

from abc import abstractmethod
from collections.abc import Hashable, Iterator

from torch import nn

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.layout import TensorLayout


class WrappingCodec(Codec):
    """Hands a tensor to ``inner`` in another form. The facts hold the ``Packed`` of ``inner``.

    Args:
        inner: the codec that chooses the bytes.
    """

    wraps = True

    def __init__(self, inner: Codec) -> None:
        self.inner = inner
        self.name = inner.name
        self.compresses = inner.compresses
        self.stores_differences = inner.stores_differences

    @abstractmethod
    def around(self, inner: Codec) -> Codec:
        """Returns this codec around another inner codec."""

    @property
    def per_site(self) -> bool:
        return self.inner.per_site

    def at_site(self, key: Hashable) -> Codec:
        return self.around(self.inner.at_site(key))

    def quantizers(self) -> Iterator[nn.Module]:
        return self.inner.quantizers()

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return self.inner.stored_nbytes(layout)

    def as_given(self, packed: Packed) -> Packed:
        stored: Packed = packed.facts
        told = stored.codec.as_given(stored)
        return packed if told is stored else Packed(
            self.around(told.codec), told.tensors, packed.layout, told, packed.where)

    def around_innermost(self, codec: Codec) -> Codec:
        """Returns this codec, and all codecs inside of it, around another innermost codec."""
        inner = self.inner
        return self.around(
            inner.around_innermost(codec) if isinstance(inner, WrappingCodec) else codec)

    @staticmethod
    def stored_in(packed: Packed) -> Packed:
        """Returns the ``Packed`` of ``inner``, with the tensors of ``packed``, which are checked."""
        return packed.facts.with_tensors(packed.tensors)


def innermost_of(codec: Codec) -> Codec:
    """Returns the codec that chooses the bytes, inside codecs that change order or units."""
    while isinstance(codec, WrappingCodec):
        codec = codec.inner
    return codec
