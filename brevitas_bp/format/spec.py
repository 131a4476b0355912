"""The static facts of one bucket quantizer: what a fused kernel needs to know."""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Real
from typing import Any, Literal

import torch

ScaleRule = Literal["min_max", "max", "l2"]
CodeRange = Literal["unsigned", "narrow", "sign_magnitude"]
MixPer = Literal["bucket", "tensor"]

MAX_BIT_WIDTH = 8
METADATA_DTYPES = (torch.float32, torch.bfloat16)


def check_bit_width(where: str, bit_width: Any) -> int:
    """Returns ``bit_width``, an int in 1..8, or raises."""
    if not isinstance(bit_width, int) or isinstance(bit_width, bool) or not (
            1 <= bit_width <= MAX_BIT_WIDTH):
        raise ValueError(
            f"{where}: bit_width must be an integer in 1..{MAX_BIT_WIDTH}, got {bit_width!r}; "
            "a code has to fit into one byte")
    return bit_width


def check_bucket_size(where: str, bucket_size: Any) -> int | None:
    """Returns ``bucket_size`` (None: one bucket per tensor), or raises."""
    if bucket_size is None:
        return None
    if not isinstance(bucket_size, int) or isinstance(bucket_size, bool) or bucket_size <= 0 or (
            bucket_size % 8):
        raise ValueError(
            f"{where}: bucket_size must be a positive multiple of 8 (so that a bucket ends on a "
            f"byte at every bit width) or None for one bucket per tensor, got {bucket_size!r}")
    return bucket_size


def check_probability(where: str, name: str, probability: Any) -> float:
    """Returns ``probability`` as a float in [0, 1], or raises."""
    if not isinstance(probability, Real) or not 0.0 <= float(probability) <= 1.0:
        raise ValueError(f"{where}: {name} must be a number in [0, 1], got {probability!r}")
    return float(probability)


def check_metadata_dtype(where: str, dtype: torch.dtype) -> torch.dtype:
    """Returns ``dtype`` if scale and offset can be stored in it, or raises."""
    if dtype not in METADATA_DTYPES:
        raise ValueError(
            f"{where}: metadata_dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    return dtype


@dataclass(frozen=True)
class BucketQuantSpec:
    """A bucket quantizer, lowered.

    Attributes:
        bit_width: bits of a stored code, 1..8.
        bucket_size: elements of a bucket, a multiple of 8; None is one bucket per tensor.
        scale_rule: "min_max" (affine), "max" (largest magnitude) or "l2" (norm of the bucket).
        code_range: "unsigned" codes 0..2**b-1, "narrow" codes -(2**(b-1)-1)..2**(b-1)-1, or
            "sign_magnitude" codes -2**(b-2)..2**(b-2).
        stochastic: stochastic rounding; otherwise to nearest, ties to even.
        integer_zero_point: round the affine zero point to an integer (biased at the range ends).
        metadata_dtype: stored dtype of scale and offset; float32 means "the dtype computed in".
        mix_bit_width: second width, or None.
        mix_prob: probability of the second width.
        mix_per: one draw per "bucket" or one per "tensor".
        row_size: elements of a row. The last bucket of each row is padded, so that no bucket holds
            elements of two rows. None: buckets follow one another through the whole tensor.
    """

    bit_width: int = 2
    bucket_size: int | None = 256
    scale_rule: ScaleRule = "min_max"
    code_range: CodeRange = "unsigned"
    stochastic: bool = True
    integer_zero_point: bool = False
    metadata_dtype: torch.dtype = torch.float32
    mix_bit_width: int | None = None
    mix_prob: float = 0.0
    mix_per: MixPer = "bucket"
    row_size: int | None = None

    def __hash__(self) -> int:
        # It is looked up for every tensor: what specs differ in most is enough.
        return hash((self.bit_width, self.bucket_size, self.row_size, self.mix_prob))

    def __post_init__(self) -> None:
        where = "brevitas_bp.format.BucketQuantSpec"
        check_bucket_size(where, self.bucket_size)
        check_metadata_dtype(where, self.metadata_dtype)
        check_probability(where, "mix_prob", self.mix_prob)
        for width in self.bit_widths:
            check_bit_width(where, width)
            check_code_range(where, self.code_range, width)
        if (self.scale_rule == "min_max") != (self.code_range == "unsigned"):
            raise ValueError(
                f"{where}: scale_rule 'min_max' goes with code_range 'unsigned' and the others with "
                f"signed codes, got {self.scale_rule!r} with {self.code_range!r}")
        if self.integer_zero_point and self.metadata_dtype != torch.float32:
            raise ValueError(
                f"{where}: an integer zero point needs metadata_dtype=torch.float32, got "
                f"{self.metadata_dtype}; a rounded offset would move zero off the grid")
        if self.row_size is not None and (self.bucket_size is None or self.row_size < 1):
            raise ValueError(
                f"{where}: row_size must be a positive number of elements, beside a bucket_size, got "
                f"row_size={self.row_size!r} and bucket_size={self.bucket_size!r}")

    def in_rows(self, length: int) -> "BucketQuantSpec":
        """The same quantizer with buckets that end with each row of ``length`` elements.

        The buckets of a row are equally large, and no larger than ``bucket_size``. One bucket for the
        whole tensor stays one.

        >>> rows = BucketQuantSpec(bucket_size=256).in_rows
        >>> [(spec.bucket_size, spec.row_size) for spec in (rows(768), rows(300), rows(49))]
        [(256, None), (152, 300), (56, 49)]
        """
        if self.bucket_size is None:
            return self
        size = row_bucket(length, self.bucket_size)
        # Buckets that fill a row need not know of it.
        return replace(
            self, bucket_size=size, row_size=None if length % size == 0 else length)

    def to_text(self) -> str:
        """All of it as text, for operators of compiled graphs, which take no objects.

        >>> BucketQuantSpec.from_text(BucketQuantSpec(3).to_text()) == BucketQuantSpec(3)
        True
        """
        return json.dumps({**vars(self), "metadata_dtype": str(self.metadata_dtype)})

    @classmethod
    def from_text(cls, text: str) -> "BucketQuantSpec":
        """What :meth:`to_text` wrote."""
        return _from_text(text)

    @property
    def bit_widths(self) -> tuple[int, ...]:
        """The widths a bucket can have; the first is the base width."""
        if self.mix_bit_width is None:
            return (self.bit_width,)
        return (self.bit_width, self.mix_bit_width)

    @property
    def affine(self) -> bool:
        """Whether an offset is stored beside the scale."""
        return self.scale_rule == "min_max"

    @property
    def pads_with_zero(self) -> bool:
        """Whether the tail is padded with zeros (l2) or with its last element (min-max, max)."""
        return self.scale_rule == "l2"


def row_bucket(length: int, bucket_size: int) -> int:
    """Size of the buckets of a row: equal parts of it, padded to a multiple of 8 elements.

    >>> [row_bucket(length, 256) for length in (1, 49, 192, 256, 1000)]
    [8, 56, 192, 256, 256]
    """
    parts = -(-length // bucket_size)
    return -(-length // (8 * parts)) * 8


@lru_cache(maxsize=256)
def _from_text(text: str) -> BucketQuantSpec:
    fields = json.loads(text)
    name = fields.pop("metadata_dtype").removeprefix("torch.")
    return BucketQuantSpec(**fields, metadata_dtype=getattr(torch, name))


def check_code_range(where: str, code_range: CodeRange, bit_width: int) -> None:
    """Raises where ``bit_width`` leaves no level on both sides of zero."""
    least = {"unsigned": 1, "narrow": 2, "sign_magnitude": 2}[code_range]
    if bit_width < least:
        raise ValueError(
            f"{where}: {code_range} codes need bit_width >= {least}, got {bit_width}; use a "
            "shifted-uint (min-max) quantizer for 1 bit")


def top_code(code_range: CodeRange, bit_width: int) -> int:
    """The largest code, which is also what the scale divides the range by.

    >>> [top_code(r, 4) for r in ("unsigned", "narrow", "sign_magnitude")]
    [15, 7, 4]
    """
    if code_range == "unsigned":
        return 2**bit_width - 1
    if code_range == "narrow":
        return 2**(bit_width - 1) - 1
    return 2**(bit_width - 2)


def lowest_code(code_range: CodeRange, bit_width: int) -> int:
    """The smallest code; stored codes are counted from it."""
    return 0 if code_range == "unsigned" else -top_code(code_range, bit_width)
