"""Quantization at the time of backward, for ablations."""

from torch import Tensor

from brevitas_bp.codec.base import Codec, Keep, Packed


class QuantizeOnBackward(Codec):
    """Keeps the float tensor and sends it through another codec when backward asks for it.

    Saves no memory: it separates the effect of quantization from that of storing early. With the same
    seed the gradient is that of the other codec, bit for bit. Source: Li, 2025, chapter 4.
    """

    owns = False

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.keep = Keep()
        self.name = f"{codec.name} on backward"

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Keeps ``x`` and the seed."""
        kept = self.keep.encode(x, where=where)
        return Packed(self, kept.tensors, kept.layout, (kept, seed, []), where)

    def decode(self, packed: Packed) -> Tensor:
        """Encodes, at the first call, and decodes now."""
        kept, seed, encoded = packed.facts
        x = self.keep.decode(kept)
        if not encoded:
            # Not at each call: a quantizer that collects statistics would give other codes.
            encoded.append(self.codec.encode(x, seed=seed, where=packed.where))
        # What is in other units goes with other tensors in these units, smaller or not.
        return encoded[0].decode() if encoded[0].is_smaller or self.codec.wraps else x
