"""One way to store a tensor: with a width, a bucket size and averages, or exact."""

import re
from contextlib import suppress
from dataclasses import dataclass

from brevitas_bp.codec.base import Codec
from brevitas_bp.format.spec import check_bit_width

_WHERE = "brevitas_bp.allocate.Candidate"
_NOTATION = re.compile(r"(\d+)(?:avg(\d+))?(?:@(\d+))?")
# Each average takes 2 bits, as in the paper.
_AVERAGES = {0.5: "2avg4", 0.25: "2avg8"}


@dataclass(frozen=True)
class Candidate:
    """One way to store a tensor.

    The notation is "exact", "2", "2@64" with a bucket size, or "2avg4" for 2-bit means of 4 elements.
    The numbers 0.5 and 0.25 mean "2avg4" and "2avg8". The number 1 means a 1-bit code for each element;
    averages that take one bit per element are "2avg2".

    Attributes:
        bits: bits of each code, 1..8; None keeps the tensor exact.
        bucket_size: codes per bucket; None: as configured.
        average_size: number of neighbours that share one stored mean.

    Raises:
        ValueError: a width or a size is not supported.

    >>> Candidate.parse("2@64")
    Candidate(bits=2, bucket_size=64, average_size=1)
    >>> str(Candidate.parse(4)), str(Candidate.parse(0.25)), str(Candidate.parse("exact"))
    ('4', '2avg8', 'exact')
    """

    bits: int | None
    bucket_size: int | None = None
    average_size: int = 1

    def __post_init__(self) -> None:
        if self.bits is not None:
            check_bit_width(_WHERE, self.bits)
        if self.average_size < 1 or (
                self.bucket_size is not None and (self.bucket_size < 8 or self.bucket_size % 8)):
            raise ValueError(
                f"{_WHERE}: expected an average_size of 1 or more and a bucket_size that is a "
                f"multiple of 8, got {self.average_size} and {self.bucket_size}")

    @classmethod
    def parse(cls, given: "Candidate | float | str") -> "Candidate":
        """Returns the candidate for a text or for a number of bits."""
        if isinstance(given, Candidate):
            return given
        text = str(given)
        if text == "exact":
            return cls(None)
        with suppress(ValueError):
            text = _AVERAGES.get(float(text), text.removesuffix(".0"))
        match = _NOTATION.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{_WHERE}: expected 'exact', a number of bits such as 2 or 0.5, bits and bucket size "
                f"such as '2@64', or means such as '2avg4', got {given!r}")
        bits, average, bucket = (None if part is None else int(part) for part in match.groups())
        return cls(bits, bucket, average or 1)

    def __str__(self) -> str:
        if self.bits is None:
            return "exact"
        average = "" if self.average_size == 1 else f"avg{self.average_size}"
        return f"{self.bits}{average}" + ("" if self.bucket_size is None else f"@{self.bucket_size}")

    @property
    def nominal_bits(self) -> float:
        """Bits of codes per element; infinite for exact."""
        return float("inf") if self.bits is None else self.bits / self.average_size

    def codec(self, configured: Codec) -> Codec | None:
        """Returns the variant of the configured codec; None keeps the tensor exact.

        Raises:
            ValueError: the codec has no widths, or cannot have this width.
        """
        if self.bits is None:
            return None
        try:
            made = configured.variant(self.bits, self.bucket_size, self.average_size)
        except ValueError as error:
            raise ValueError(
                f"{_WHERE}: the quantizer {configured.name!r} cannot store {str(self)!r}: {error}; or "
                f"leave {str(self)!r} out of the candidates, the plan or the overrides") from error
        if made is None:
            raise ValueError(
                f"{_WHERE}: {configured.name!r} is no bucket quantizer, so it has no variant of "
                f"{self.bits} bits; configure a quantizer of brevitas_bp.quant")
        return made
