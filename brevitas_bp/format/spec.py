"""The static facts of one bucket quantizer: everything that a fused kernel needs to know."""

import json
from collections.abc import Set
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Real
from typing import Any, Literal

import torch

from brevitas_bp.format.stages import (
    MIN_MAX,
    NEAREST,
    NO_TRANSFORM,
    STOCHASTIC,
    UNSIGNED,
    CodeRange,
    Rounding,
    ScaleRule,
    Stage,
    Transform,
)

MixPer = Literal["bucket", "tensor"]

MAX_BIT_WIDTH = 8
METADATA_DTYPES = (torch.float32, torch.bfloat16)


def check_bit_width(where: str, bit_width: Any) -> int:
    """Returns ``bit_width`` if it is an int in 1..8, or raises."""
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


#: Field of a spec -> the table of its rows.
_TABLES: dict[str, type[Stage]] = {
    "scale_rule": ScaleRule, "code_range": CodeRange, "rounding": Rounding, "transform": Transform}


def _check_zero_in_range(where: str, spec: "BucketQuantSpec") -> None:
    if min(spec.bit_widths) < 2:
        raise ValueError(
            f"{where}: the scale rule {spec.scale_rule.name!r} needs 2 bits or more, got "
            f"{min(spec.bit_widths)}; with one bit, no grid has zero and levels on both of its sides")
    if spec.metadata_dtype != torch.float32 or spec.integer_zero_point:
        raise ValueError(
            f"{where}: the scale rule {spec.scale_rule.name!r} needs metadata_dtype=torch.float32 and "
            f"no integer_zero_point, got {spec.metadata_dtype} and {spec.integer_zero_point}; it has an "
            "integer zero point of its own, and a rounded offset would move zero off the grid")


@dataclass(frozen=True)
class BucketQuantSpec:
    """A bucket quantizer as kernels see it: one row of each stage table, and the sizes.

    Attributes:
        bit_width: bits of a stored code, 1..8.
        bucket_size: elements of a bucket, a multiple of 8; None means one bucket for each tensor.
        scale_rule: computes scale and offset from the values of a bucket.
        code_range: the codes of each width.
        rounding: turns scaled values into codes.
        integer_zero_point: rounds the affine zero point to an integer (biased at the range ends).
        metadata_dtype: stored dtype of scale and offset; float32 means the compute dtype, which is
            float64 for float64 tensors.
        mix_bit_width: second width, or None.
        mix_prob: probability of the second width.
        mix_per: one draw of the width for each "bucket" or one for each "tensor".
        row_size: elements of a row. The last bucket of each row is padded, so no bucket holds elements
            of two rows. None: buckets follow one another through the whole tensor.
        transform: applied to each bucket before it is quantized.

    Raises:
        ValueError: a size or width is out of range, or the rows do not fit together.
    """

    bit_width: int = 2
    bucket_size: int | None = 256
    scale_rule: ScaleRule = MIN_MAX
    code_range: CodeRange = UNSIGNED
    rounding: Rounding = STOCHASTIC
    integer_zero_point: bool = False
    metadata_dtype: torch.dtype = torch.float32
    mix_bit_width: int | None = None
    mix_prob: float = 0.0
    mix_per: MixPer = "bucket"
    row_size: int | None = None
    transform: Transform = NO_TRANSFORM

    def __hash__(self) -> int:
        # The hash is computed for every saved tensor. These fields suffice to tell most specs apart.
        return hash((self.bit_width, self.bucket_size, self.row_size, self.mix_prob))

    def __post_init__(self) -> None:
        where = "brevitas_bp.format.BucketQuantSpec"
        check_bucket_size(where, self.bucket_size)
        check_metadata_dtype(where, self.metadata_dtype)
        check_probability(where, "mix_prob", self.mix_prob)
        for field, table in _TABLES.items():
            if not isinstance(getattr(self, field), table):
                raise TypeError(
                    f"{where}: {field} must be a row of {table.__name__} (one of {list(table.rows)}), "
                    f"got {getattr(self, field)!r}; {table.__name__}.named(...) finds one by its name")
        for width in self.bit_widths:
            check_bit_width(where, width)
            check_code_range(where, self.code_range, width)
        if self.scale_rule.signed != self.code_range.signed:
            raise ValueError(
                f"{where}: the scale rule {self.scale_rule.name!r} goes with "
                f"{'signed' if self.scale_rule.signed else 'unsigned'} codes, got "
                f"{self.code_range.name!r}")
        if (self.scale_rule.refit is None) != (self.code_range.nearest is None):
            raise ValueError(
                f"{where}: the scale rule {self.scale_rule.name!r} does not go with "
                f"{self.code_range.name!r} codes; levels need an unbiased scale, and only they do")
        if self.code_range.nearest is not None and self.rounding is not NEAREST:
            raise ValueError(
                f"{where}: {self.code_range.name!r} codes are those of the nearest levels, got the "
                f"rounding {self.rounding.name!r}; use rounding to nearest")
        if self.rounding.unsigned and self.code_range.signed:
            raise ValueError(
                f"{where}: {self.rounding.name!r} rounding needs unsigned codes, got "
                f"{self.code_range.name!r}")
        if self.integer_zero_point and self.metadata_dtype != torch.float32:
            raise ValueError(
                f"{where}: an integer zero point needs metadata_dtype=torch.float32, got "
                f"{self.metadata_dtype}; a rounded offset would move zero off the grid")
        if self.scale_rule.zero_in_range:
            _check_zero_in_range(where, self)
        if self.row_size is not None and (self.bucket_size is None or self.row_size < 1):
            raise ValueError(
                f"{where}: row_size must be a positive number of elements and needs a bucket_size, got "
                f"row_size={self.row_size!r} and bucket_size={self.bucket_size!r}")
        if self.works_in_units and self.bucket_size is None:
            raise ValueError(
                f"{where}: {self.transform.name!r} buckets with {self.code_range.name!r} codes need a "
                "bucket_size, because their temporaries are as large as a bucket, and without a "
                "bucket_size that is the whole tensor; set for instance bucket_size=256")
        if self.transform.power_of_two and not is_rotatable(self.bucket_size):
            raise ValueError(
                f"{where}: {self.transform.name!r} buckets have a power of two of elements, 16 or more, "
                f"got bucket_size={self.bucket_size!r}; use for instance 64 or 256")

    def in_rows(self, length: int) -> "BucketQuantSpec":
        """Returns this quantizer with buckets that end with each row of ``length`` elements.

        The buckets of a row are equally large, and no larger than ``bucket_size``. One bucket for the
        whole tensor stays one bucket.

        >>> rows = BucketQuantSpec(bucket_size=256).in_rows
        >>> [(spec.bucket_size, spec.row_size) for spec in (rows(768), rows(300), rows(49))]
        [(256, None), (152, 300), (56, 49)]
        """
        if self.bucket_size is None:
            return self
        size = self._power_bucket(length) if self.transform.power_of_two else (
            row_bucket(length, self.bucket_size))
        # Buckets that fill a row exactly need no row_size.
        return replace(
            self, bucket_size=size, row_size=None if length % size == 0 else length)

    def for_numel(self, numel: int) -> "BucketQuantSpec":
        """Returns this quantizer with a bucket that is not much larger than the whole tensor.

        Only buckets whose padding is stored too become smaller.

        >>> from brevitas_bp.format.stages import ROTATED
        >>> BucketQuantSpec(transform=ROTATED).for_numel(40).bucket_size
        64
        """
        if not self.transform.power_of_two or self.bucket_size is None:
            return self
        least = max(16, 1 << (numel - 1).bit_length())
        return self if self.bucket_size <= least else _with_bucket_size(self, least)

    def _power_bucket(self, length: int) -> int:
        """Returns the power of two with which a row takes the fewest bytes; the larger of two such."""
        assert self.bucket_size is not None
        metadata = self.metadata_dtype.itemsize * (1 + self.affine)
        sizes = [1 << k for k in range(4, self.bucket_size.bit_length())]

        def nbytes(size: int) -> int:
            return -(-length // size) * (size * self.bit_width // 8 + metadata)

        return min(reversed(sizes), key=nbytes)

    def to_text(self) -> str:
        """Returns the spec as text, for operators of compiled graphs, which take no objects.

        >>> BucketQuantSpec.from_text(BucketQuantSpec(3).to_text()) == BucketQuantSpec(3)
        True
        """
        stages = {field: getattr(self, field).name for field in _TABLES}
        return json.dumps({**vars(self), **stages, "metadata_dtype": str(self.metadata_dtype)})

    @classmethod
    def from_text(cls, text: str) -> "BucketQuantSpec":
        """Reads a spec that :meth:`to_text` wrote."""
        return _from_text(text)

    @property
    def bit_widths(self) -> tuple[int, ...]:
        """The widths that a bucket can have: the base width, then the second width if there is one."""
        if self.mix_bit_width is None:
            return (self.bit_width,)
        return (self.bit_width, self.mix_bit_width)

    @property
    def range_rule(self) -> int:
        """Number of the scale rule whose ranges kernels compute."""
        return (MIN_MAX if self.scale_rule.zero_in_range else self.scale_rule).number

    @property
    def offset_form(self) -> int:
        """How kernels make the offset from a range: 0: the minimum; 1: rounded; 2: zero in range."""
        return 2 if self.scale_rule.zero_in_range else int(self.integer_zero_point)

    @property
    def affine(self) -> bool:
        """Whether an offset is stored beside the scale."""
        return self.scale_rule.affine

    @property
    def pads_with_zero(self) -> bool:
        """Whether a partial bucket is padded with zeros; otherwise it repeats its last element."""
        return self.scale_rule.pads_with_zero or self.transform.pads_with_zero

    @property
    def works_in_units(self) -> bool:
        """Whether buckets are divided by a power of two first (:mod:`brevitas_bp.format.reference`)."""
        return self.transform is not NO_TRANSFORM or self.scale_rule.refit is not None

    @property
    def decoding_draws(self) -> bool:
        """Whether decoding repeats the draws that encoding made from the seed."""
        return self.rounding.decoding_draws or self.transform.draws or self.mix_bit_width is not None

    def is_covered_by(self, stages: Set[Stage]) -> bool:
        """Returns whether ``stages`` contains all stages of this quantizer."""
        return {getattr(self, field) for field in _TABLES} <= stages


@lru_cache(maxsize=256)
def _with_bucket_size(spec: BucketQuantSpec, size: int) -> BucketQuantSpec:
    return replace(spec, bucket_size=size)


def is_rotatable(bucket_size: int | None) -> bool:
    """Returns whether buckets of this size can be rotated: a power of two, 16 or more."""
    return bucket_size is not None and bucket_size >= 16 and bucket_size & (bucket_size - 1) == 0


def row_bucket(length: int, bucket_size: int) -> int:
    """Returns the size of the buckets of a row: equal parts of it, padded to a multiple of 8 elements.

    >>> [row_bucket(length, 256) for length in (1, 49, 192, 256, 1000)]
    [8, 56, 192, 256, 256]
    """
    parts = -(-length // bucket_size)
    return -(-length // (8 * parts)) * 8


@lru_cache(maxsize=256)
def _from_text(text: str) -> BucketQuantSpec:
    fields = json.loads(text)
    name = fields.pop("metadata_dtype").removeprefix("torch.")
    stages: dict[str, Any] = {field: table.named(fields.pop(field)) for field, table in _TABLES.items()}
    return BucketQuantSpec(**fields, **stages, metadata_dtype=getattr(torch, name))


def check_code_range(where: str, code_range: CodeRange, bit_width: int) -> None:
    """Raises if ``bit_width`` is too small for codes of this range."""
    if bit_width < code_range.least_width:
        raise ValueError(
            f"{where}: {code_range.name} codes need bit_width >= {code_range.least_width}, got "
            f"{bit_width}; use a shifted-uint (min-max) quantizer for 1 bit")
