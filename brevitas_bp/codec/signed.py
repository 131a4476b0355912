"""A codec that stores the sign exactly, and the negative part with another codec."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from brevitas_bp.codec.base import FLOATS, Codec, Packed
from brevitas_bp.codec.integrity import TensorType, refuse
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.regions import positive_region
from brevitas_bp.codec.rows import Rows, in_rows
from brevitas_bp.format.masks import mask_nbytes


@final
@dataclass(frozen=True)
class SignExact(Codec):
    """Stores the input of ``prelu``: 1 bit for ``x > 0``, and ``min(x, 0)`` with ``inner``.

    Backward is ``grad_x = grad where x > 0 else w * grad`` and ``grad_w = sum(grad * min(x, 0))``. The
    sign is exact, so the gradient of the input is that of plain autograd, bit for bit. The gradient of
    the weight is linear in what ``inner`` stores, so it is unbiased if ``inner`` is. Values that
    ``inner`` decodes above 0 are cut to 0. If the range comes from the data, the cut is no more than the
    rounding of the metadata.

    An element decodes to 1 if ``x > 0``, else to the negative part. NaN stays NaN as far as ``inner``
    keeps it.

    Attributes:
        inner: codec of the negative part, which is zero where ``x > 0``.
    """

    restores = FLOATS

    inner: Codec
    name: str = "sign and negative part"

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Packs the sign, and encodes ``min(x, 0)``."""
        layout = self.layout_of(x, where)
        # Detach, because codecs run while autograd is recording.
        base = TensorLayout.base(x.detach())
        sign = positive_region().encode(base)
        negative = self.inner.encode(base.clamp(max=0), seed=seed, where=where)
        return Packed(
            self, (*sign.tensors, *negative.tensors), layout, (sign, negative), where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns 1 or the negative part of each element."""
        sign, negative = _parts(packed)
        # clamp copies, because the inner codec may return a tensor that it keeps.
        x = negative.decode().clamp(max=0)
        return packed.layout.restore(x.masked_fill_(sign.decode() > 0, 1))

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        layout = packed.layout
        for half in packed.facts:
            if (half.layout.shape, half.layout.dtype) != (layout.base_shape, layout.dtype):
                refuse(packed, f"halves of {layout}", half.layout)
        # The halves compare their tensors with their layouts when they are decoded.
        return [TensorType(tuple(t.shape), t.dtype) for half in packed.facts for t in half.tensors]

    def in_rows(self, length: int, last: int) -> Codec:
        inner = in_rows(self.inner, Rows(length, last))
        return self if inner is self.inner else SignExact(inner)

    @property
    def per_site(self) -> bool:
        return self.inner.per_site

    def at_site(self, key: Hashable) -> Codec:
        return SignExact(self.inner.at_site(key))

    def quantizers(self) -> Iterator[nn.Module]:
        return self.inner.quantizers()

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        inner = self.inner.stored_nbytes(layout)
        return None if inner is None else inner + mask_nbytes(layout.numel)


def _parts(packed: Packed) -> tuple[Packed, Packed]:
    """Returns both halves, with the tensors of ``packed``, which have been checked."""
    sign, negative = packed.facts
    count = len(sign.tensors)
    return sign.with_tensors(packed.tensors), negative.with_tensors(packed.tensors[count:])


def sign_exact(inner: Codec) -> SignExact:
    """Returns the codec of ``prelu``'s input, around an inner codec."""
    return SignExact(inner)
