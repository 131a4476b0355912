"""One way to store a tensor: a kind of code, a width, a bucket size and averages, or exact."""

import re
from contextlib import suppress
from dataclasses import dataclass

from brevitas_bp.codec.base import Codec
from brevitas_bp.codec.lowered import KINDS
from brevitas_bp.format.spec import check_bit_width

_WHERE = "brevitas_bp.allocate.Candidate"
_NOTATION = re.compile(rf"(?:({'|'.join(KINDS)}) )?(\d+)(?:avg(\d+))?(?:@(\d+))?")
# Each average takes 2 bits, as in the paper.
_AVERAGES = {0.5: "2avg4", 0.25: "2avg8"}


@dataclass(frozen=True)
class Candidate:
    """One way to store a tensor.

    The notation is "exact", "2", "2@64" with a bucket size, or "2avg4" for 2-bit means of 4 elements.
    The numbers 0.5 and 0.25 mean "2avg4" and "2avg8". The number 1 means a 1-bit code for each element;
    averages that take one bit per element are "2avg2".

    A kind of code may stand before the bits: "rotated 2", "dithered 4" or "stochastic 2". Without one,
    the policy chooses the kind from the operation.

    Attributes:
        bits: bits of each code, 1..8; None keeps the tensor exact.
        bucket_size: codes per bucket; None: as configured.
        average_size: number of neighbours that share one stored mean.
        kind: "rotated", "dithered", "stochastic" or "companded"; None: the kind that the policy
            chooses.

    Raises:
        ValueError: a width, a size or a kind is not supported.

    >>> Candidate.parse("2@64")
    Candidate(bits=2, bucket_size=64, average_size=1, kind=None)
    >>> str(Candidate.parse(4)), str(Candidate.parse(0.25)), str(Candidate.parse("exact"))
    ('4', '2avg8', 'exact')
    """

    bits: int | None
    bucket_size: int | None = None
    average_size: int = 1
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.bits is not None:
            check_bit_width(_WHERE, self.bits)
        if self.average_size < 1 or (
                self.bucket_size is not None and (self.bucket_size < 8 or self.bucket_size % 8)):
            raise ValueError(
                f"{_WHERE}: expected an average_size of 1 or more and a bucket_size that is a "
                f"multiple of 8, got {self.average_size} and {self.bucket_size}")
        if self.kind is not None and (self.kind not in KINDS or self.bits is None):
            raise ValueError(
                f"{_WHERE}: kind must be one of {sorted(KINDS)} (with bits) or None, got {self.kind!r}")

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
                "such as '2@64', means such as '2avg4', or a kind of code such as 'rotated 2', got "
                f"{given!r}")
        kind, *numbers = match.groups()
        bits, average, bucket = (None if part is None else int(part) for part in numbers)
        return cls(bits, bucket, average or 1, kind)

    def __str__(self) -> str:
        if self.bits is None:
            return "exact"
        average = "" if self.average_size == 1 else f"avg{self.average_size}"
        kind = "" if self.kind is None else f"{self.kind} "
        size = "" if self.bucket_size is None else f"@{self.bucket_size}"
        return f"{kind}{self.bits}{average}{size}"

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
            kind = configured if self.kind is None else configured.of_kind(self.kind)
            made = None if kind is None else kind.variant(self.bits, self.bucket_size, self.average_size)
        except ValueError as error:
            raise ValueError(
                f"{_WHERE}: the quantizer {configured.name!r} cannot store {str(self)!r}: {error}; or "
                f"leave {str(self)!r} out of the candidates, the plan or the overrides") from error
        if made is None:
            raise ValueError(
                f"{_WHERE}: {configured.name!r} is no bucket quantizer, so it has no variant of "
                f"{self.bits} bits; configure a quantizer of brevitas_bp.quant")
        return made
