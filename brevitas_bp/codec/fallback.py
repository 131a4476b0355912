"""The common part of codecs that suit some tensors only, and leave the others to another codec.

NOTE [ Codes with a fallback ]
1. A published code suits some tensors: maps, inputs of layers, tensors whose error may be biased. For
   all others, the codec has another codec, its ``fallback``. By default that is the plain stochastic
   codec.
2. A tensor that the fallback stores has a ``Packed`` of the fallback. So reports and ``explain()`` name
   the code that was used, and count its bytes.
3. The policy asks a codec for its forms: for factors, for probabilities, with more bits. The fallback
   answers, because an error of a factor reaches all gradients further up. A codec with widths of its own
   answers for more bits itself.
4. Compiled graphs have no form of these codes: tensors of a graph stay exact, and the wrapper warns.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from brevitas_bp.codec.base import FLOATS, Codec
from brevitas_bp.codec.derived import variants
from brevitas_bp.codec.plain import plain_codec
from brevitas_bp.codec.quantized import codec_from
from brevitas_bp.errors import UnsupportedQuantizerError
from brevitas_bp.format.arithmetic import compute_dtype, stored_metadata_dtype


class FallbackCodec(Codec):
    """A codec that suits some tensors, with a fallback for all others.

    See NOTE [ Codes with a fallback ].

    Args:
        fallback: stores tensors that this codec does not suit.
    """

    restores = FLOATS
    decodes_anew = True

    def __init__(self, fallback: Codec) -> None:
        self.fallback = fallback

    @abstractmethod
    def with_fallback(self, fallback: Codec) -> Codec:
        """Returns this codec with another fallback. The new codec must not hold this one."""

    @property
    def per_element(self) -> Codec:
        """The fallback, which has a code of its own for each element."""
        return self.fallback

    @property
    def for_factors(self) -> Codec:
        return self.fallback.for_factors

    @property
    def for_probabilities(self) -> Codec | None:
        return self.fallback.for_probabilities

    @property
    def for_magnitudes(self) -> Codec | None:
        return self.fallback.for_magnitudes

    def at_least(self, bits: int) -> Codec:
        return super().at_least(bits) if self.bit_widths else self.fallback.at_least(bits)

    def is_variant_of(self, configured: Codec) -> bool:
        return super().is_variant_of(configured) or variants.has(configured, self)

    def quantizers(self) -> Iterator[nn.Module]:
        return self.fallback.quantizers()

    def in_rows(self, length: int, last: int) -> Codec:
        fallback = self.fallback.in_rows(length, last)
        return self if fallback is self.fallback else self.with_fallback(fallback)


def fallback_from(where: str, given: Any, bits: int = 2) -> Codec:
    """Returns the fallback that a user has given: a codec, a quantizer, or None.

    Args:
        where: the class that takes the argument.
        given: the argument. None is the plain stochastic codec of ``bits`` bits.
        bits: width of the plain codec.

    Raises:
        UnsupportedQuantizerError: the quantizer keeps statistics of each tensor.
    """
    if given is None:
        return plain_codec(bits)
    codec = given if isinstance(given, Codec) else codec_from(given)
    if codec.per_site:
        raise UnsupportedQuantizerError(
            f"{where}: fallback must treat all tensors alike, got {codec.name!r}, which keeps "
            "statistics of each tensor; use a quantizer without a running range")
    return codec


def check_share(where: str, name: str, share: Any) -> float:
    """Returns a share as a float in (0, 1].

    Raises:
        ValueError: it is no number in (0, 1].
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ValueError(f"{where}: {name} must be a number in (0, 1], got {share!r}")
    return float(share)


def check_size(where: str, name: str, size: Any) -> int:
    """Returns a positive integer.

    Raises:
        ValueError: it is none.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{where}: {name} must be a positive integer, got {size!r}")
    return size


def half_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which values are stored in 16 bits.

    16-bit dtypes keep their own. float64 stays float64, because bfloat16 cannot hold its exponents.
    """
    return dtype if dtype.itemsize == 2 else stored_metadata_dtype(torch.bfloat16, compute_dtype(dtype))


def to_half(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds to nearest in :func:`half_dtype`. Finite values stay finite, all others become one NaN."""
    stored = half_dtype(dtype)
    limit = torch.finfo(stored).max
    return torch.where(values.isfinite(), values.clamp(-limit, limit).to(stored), torch.nan)
