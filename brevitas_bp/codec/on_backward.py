"""A codec that quantizes at the time of backward, for ablations."""

from typing import Any

from torch import Tensor

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.keep import Keep


class QuantizeOnBackward(Codec):
    """Keeps the float tensor, and encodes it with another codec only when backward asks for it.

    It saves no memory. It separates the effect of quantization from the effect of storing early. With
    the same seed, the gradient is that of the other codec, bit for bit. Source: Li, 2025, chapter 4.
    """

    owns = False

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.keep = Keep()
        self.name = f"{codec.name} on backward"

    @property
    def postponed(self) -> Codec:
        return self.codec

    def without_units(self, packed: Packed) -> Packed:
        if not self.codec.wraps:
            return packed
        kept, seed, _ = packed.facts
        inner: Any = self.codec
        while inner.wraps:
            inner = inner.inner
        return Packed(
            QuantizeOnBackward(inner), packed.tensors, packed.layout, (kept, seed, []), packed.where)

    def is_finer_than(self, other: Codec) -> bool:
        return self.codec.is_finer_than(other)

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Keeps ``x`` and the seed."""
        kept = self.keep.encode(x, where=where)
        return Packed(self, kept.tensors, kept.layout, (kept, seed, []), where)

    def decode(self, packed: Packed) -> Tensor:
        """Encodes the kept tensor at the first call, and decodes it at every call."""
        kept, seed, encoded = packed.facts
        x = self.keep.decode(kept)
        if not encoded:
            # Encode only once: a quantizer that collects statistics would give other codes next time.
            encoded.append(self.codec.encode(x, seed=seed, where=packed.where))
        # A tensor in other units must go with other tensors in these units, whether smaller or not.
        found = encoded[0].decode() if encoded[0].is_smaller or self.codec.wraps else x
        # The layout is that of a view, if the operation saved a view of the kept tensor.
        return found if found.shape == packed.layout.shape else found.view(packed.layout.shape)
