"""The sign exactly, the negative part through another codec."""

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
    """For ``prelu``, of its input: 1 bit for ``x > 0``, and ``min(x, 0)`` through ``inner``.

    Backward is ``grad_x = grad where x > 0 else w * grad`` and ``grad_w = sum(grad * min(x, 0))``:
    with the sign exact, the gradient of the input is that of plain autograd, bit for bit, and that of
    the weight is linear in what ``inner`` stores, so unbiased if ``inner`` is. (What ``inner`` decodes
    above 0 is cut to 0: no more than the rounding of its metadata, where the range comes from the data.)

    Decoded is 1 where ``x > 0``, else the negative part; NaN stays NaN as far as ``inner`` keeps it.

    Attributes:
        inner: stores the negative part, zero where ``x > 0``.
    """

    restores = FLOATS

    inner: Codec
    name: str = "sign and negative part"

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Packs the sign, and ``min(x, 0)``."""
        layout = self.layout_of(x, where)
        # detach: codecs run while autograd is recording.
        base = TensorLayout.base(x.detach())
        sign = positive_region().encode(base)
        negative = self.inner.encode(base.clamp(max=0), seed=seed, where=where)
        return Packed(
            self, (*sign.tensors, *negative.tensors), layout, (sign, negative), where)

    def decode(self, packed: Packed) -> Tensor:
        """1 or the negative part."""
        sign, negative = _parts(packed)
        # clamp copies: the inner codec may give back what it keeps.
        x = negative.decode().clamp(max=0)
        return packed.layout.restore(x.masked_fill_(sign.decode() > 0, 1))

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        layout = packed.layout
        for half in packed.facts:
            if (half.layout.shape, half.layout.dtype) != (layout.base_shape, layout.dtype):
                refuse(packed, f"halves of {layout}", half.layout)
        # Whether they belong to their layout is compared by the halves, when they are decoded.
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
    """Both halves, of the tensors that the whole was checked with."""
    sign, negative = packed.facts
    count = len(sign.tensors)
    return sign.with_tensors(packed.tensors), negative.with_tensors(packed.tensors[count:])


def sign_exact(inner: Codec) -> SignExact:
    """The codec of ``prelu``'s input beside an inner one."""
    return SignExact(inner)
