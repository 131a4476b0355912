"""The stages of a bucket quantizer: transform, scale rule, code range and rounding.

Each of the four stages has a table of frozen rows. A row is one way to do the stage. It has a name, a
number, the facts that other code needs, and the formula in torch operations that defines its bytes. A
quantizer is made of one row of each table (:class:`~brevitas_bp.format.spec.BucketQuantSpec`).

The formulas come from two papers, each with one change:

* Chen et al., "ActNN: Reducing Training Memory Footprint via 2-Bit Activation Compressed Training",
  2021. There is no absolute epsilon here.
* Li, "Mix-Precision Stochastic Quantization of Activations during Backpropagation", 2025. Metadata are
  rounded before the codes are computed here.

NOTE [ Adding a stage ]

1. Add a row here. From then on, the torch reference computes the stage on every device.
2. Compiled kernels list the rows that they implement (``COVERED`` in :mod:`brevitas_bp.kernels.cpu` and
   :mod:`brevitas_bp.kernels.gpu`), and take the numbers of the rows as constants. The reference serves
   a quantizer with any other row.
3. A module in :mod:`brevitas_bp.core` says with ``bucket_stage(slot)`` which row it computes. If
   ``bucket_stage`` is missing or returns None, the quantizer runs through its modules, not a kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from brevitas_bp.errors import UnknownNameError, nearest
from brevitas_bp.format.arithmetic import (
    compute_dtype,
    finite_norm,
    finite_range,
    l2_norm,
    largest_magnitude,
    round_down,
    round_up,
    square_root,
    tree_sum,
    zero_in_range,
)
from brevitas_bp.format.levels import level_of, nearest_level
from brevitas_bp.format.rotation import rotate, rotate_back, sign_words

_Row = TypeVar("_Row", bound="Stage")


@dataclass(frozen=True, eq=False)
class Stage:
    """A row of one of the tables. Rows are compared by identity; copies and pickles keep the identity.

    Attributes:
        name: identifies the row in messages, in compiled graphs and in pickles.
        number: constant that identifies the row in compiled kernels.

    Raises:
        ValueError: the table already has a row of this name or number.
    """

    name: str
    number: int

    #: Name -> row; each subclass has its own table.
    rows: ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.rows = {}

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for row in self.rows.values():
            if row.name == self.name or row.number == self.number:
                raise ValueError(
                    f"brevitas_bp.format.stages.{kind}: {self.name!r} (number {self.number}) clashes "
                    f"with {row.name!r} (number {row.number}); names and numbers must differ")
        self.rows[self.name] = self

    @classmethod
    def named(cls: type[_Row], name: str) -> _Row:
        """Returns the row called ``name``.

        Raises:
            UnknownNameError: no row has this name.
        """
        if name not in cls.rows:
            raise UnknownNameError(
                f"brevitas_bp.format.stages.{cls.__name__}: unknown row {name!r}"
                f"{nearest(name, cls.rows)}")
        return cls.rows[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).named, (self.name,)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


def _unchanged(x: Tensor, buckets: Tensor | None, seed: int) -> Tensor:
    return x


@dataclass(frozen=True, eq=False, repr=False)
class Transform(Stage):
    """An invertible linear map of a bucket, applied before quantizing and undone after dequantizing.

    Attributes:
        apply: ``(x [r, B], numbers of the buckets [r], seed) -> y [r, B]``, in the compute dtype. The
            largest magnitude in a bucket is between 1 and 4, or 0. It must not grow much.
        undo: the inverse of ``apply``, with the same arguments.
        pads_with_zero: a bucket that is not full is padded with zeros, not with its last element.
        draws: the map depends on the seed.
        power_of_two: it needs buckets of 16, 32, 64, ... elements.
    """

    apply: Callable[[Tensor, Tensor, int], Tensor] = _unchanged
    undo: Callable[[Tensor, Tensor, int], Tensor] = _unchanged
    pads_with_zero: bool = False
    draws: bool = False
    power_of_two: bool = False


class Neutral:
    """The type of :data:`NEUTRAL`: the part computes no stage, for example the view of the buckets."""


#: ``bucket_stage(slot)`` of a part returns this if the part changes nothing.
NEUTRAL = Neutral()


#: No transform: values are quantized as they are.
NO_TRANSFORM = Transform("none", 0)


def _rotation(rotations: int) -> dict[str, Any]:
    def apply(x: Tensor, buckets: Tensor, seed: int) -> Tensor:
        return rotate(x, sign_words(buckets, x.shape[-1], seed), rotations)

    def undo(y: Tensor, buckets: Tensor, seed: int) -> Tensor:
        return rotate_back(y, sign_words(buckets, y.shape[-1], seed), rotations)

    return {"apply": apply, "undo": undo, "pads_with_zero": True, "draws": True, "power_of_two": True}


#: Random rotations, see :mod:`brevitas_bp.format.rotation`.
ROTATED = Transform("rotated once", 1, **_rotation(1))
ROTATED_TWICE = Transform("rotated", 2, **_rotation(2))


@dataclass(frozen=True, eq=False, repr=False)
class CodeRange(Stage):
    """The integers that codes of a width can be, and what they stand for.

    Attributes:
        signed: codes run from ``-top`` to ``top``; otherwise from 0.
        least_width: smallest width with codes on both sides of zero; 1 for unsigned codes.
        top: width -> largest code, which the scale rule divides by.
        nearest: ``(scaled values, width) -> codes``, as floats; None: the rounding makes integers.
        level: ``(codes, width) -> levels`` that codes stand for; None: codes stand for themselves.
    """

    signed: bool
    least_width: int
    top: Callable[[int], int]
    nearest: Callable[[Tensor, int], Tensor] | None = None
    level: Callable[[Tensor, int], Tensor] | None = None

    def lowest(self, bit_width: int) -> int:
        """Returns the smallest code. Stored codes are counted from the smallest code.

        >>> [r.lowest(4) for r in (UNSIGNED, NARROW, SIGN_MAGNITUDE)]
        [0, -7, -4]
        """
        return -self.top(bit_width) if self.signed else 0


UNSIGNED = CodeRange("unsigned", 0, False, 1, lambda width: 2**width - 1)
#: Symmetric: the code -2**(b-1) is not used.
NARROW = CodeRange("narrow", 1, True, 2, lambda width: 2**(width - 1) - 1)
#: Sign times one of 2**(b-2) levels, or zero: the codes of Listing 5.1 of Li, 2025.
SIGN_MAGNITUDE = CodeRange("sign_magnitude", 2, True, 2, lambda width: 2**(width - 2))
#: Places of the Lloyd-Max levels of the normal distribution, see :mod:`brevitas_bp.format.levels`.
NORMAL = CodeRange("normal", 3, False, 1, lambda width: 2**width - 1, nearest_level, level_of)


@dataclass(frozen=True, eq=False, repr=False)
class ScaleRule(Stage):
    """Computes the scale of a bucket, and an offset if the rule is affine, from the bucket's values.

    Attributes:
        affine: an offset is stored beside the scale.
        pads_with_zero: a bucket that is not full is padded with zeros, not with its last element.
        signed: the rule needs signed codes; otherwise it needs unsigned codes.
        measure:
            ``(x [n, B], top code, metadata dtype, B or None) -> (scale [n, 1], offset [n, 1] or None)``
            in the compute dtype. ``B`` is passed if ``x`` lacks its padding and is too large for
            temporaries. Metadata are rounded outwards, to values that their dtype holds.
        centres: the mean of each bucket is subtracted before the transform, and stored as the offset.
        zero_in_range: zero is a level of every bucket. Kernels start from the ranges of ``min_max``.
        refit: ``(values [n, B], levels of their codes [n, B]) -> scale [n, 1]`` to store, computed when
            the codes are known; None: the scale that ``measure`` has returned is stored.
    """

    affine: bool
    pads_with_zero: bool
    signed: bool
    measure: Callable[[Tensor, int, torch.dtype, int | None], tuple[Tensor, Tensor | None]]
    centres: bool = False
    zero_in_range: bool = False
    refit: Callable[[Tensor, Tensor], Tensor] | None = None


def _min_max(
        x: Tensor, top: int, metadata_dtype: torch.dtype,
        size: int | None) -> tuple[Tensor, Tensor | None]:
    """``lo = min``, ``scale = (max - lo) / top``."""
    computed = compute_dtype(x.dtype)
    # torch.aminmax would take eight times as long on CPU.
    lo, hi = (m.to(computed) for m in (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)))
    lo = round_down(lo + 0, metadata_dtype)
    scale = round_up(finite_range(lo, hi + 0) / top, metadata_dtype)
    return scale, torch.where(torch.isfinite(scale), lo, torch.nan)


def _max(
        x: Tensor, top: int, metadata_dtype: torch.dtype,
        size: int | None) -> tuple[Tensor, Tensor | None]:
    """``scale = max |x| / top``."""
    peak = largest_magnitude(x).to(compute_dtype(x.dtype))
    return round_up(finite_norm(peak, peak) / top, metadata_dtype), None


def _l2(
        x: Tensor, top: int, metadata_dtype: torch.dtype,
        size: int | None) -> tuple[Tensor, Tensor | None]:
    """``scale = |x| / top`` with the Euclidean norm."""
    peak = largest_magnitude(x).to(compute_dtype(x.dtype))
    return round_up(finite_norm(l2_norm(x, size), peak) / top, metadata_dtype), None


def _zero_in_range(
        x: Tensor, top: int, metadata_dtype: torch.dtype,
        size: int | None) -> tuple[Tensor, Tensor | None]:
    """``scale = max(-lo / z, hi / (top - z))`` for the code z of zero, and the offset ``-z * scale``.

    See :func:`~brevitas_bp.format.arithmetic.zero_in_range`.
    """
    computed = compute_dtype(x.dtype)
    lo, hi = (m.to(computed) for m in (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)))
    return zero_in_range(lo, hi, top)


MIN_MAX = ScaleRule("min_max", 0, True, False, False, _min_max)
MAX = ScaleRule("max", 1, False, False, True, _max)
L2 = ScaleRule("l2", 2, False, True, True, _l2)


def _deviation(
        x: Tensor, top: int, metadata_dtype: torch.dtype,
        size: int | None) -> tuple[Tensor, Tensor | None]:
    """``sqrt(mean(x**2))``: the deviation from zero."""
    energy = tree_sum(x * x) * (1 / x.shape[-1])
    return square_root(energy.to(torch.float64)).to(x.dtype), None


def _unbiased_scale(x: Tensor, levels: Tensor) -> Tensor:
    """``S = sum(x**2) / sum(x * level)``: along ``x``, the decoded bucket has the length of ``x``."""
    along = tree_sum(x * levels)
    return torch.where(along > 0, tree_sum(x * x) / along, 0)


#: The scale of Vargaftik et al., 2021 and 2022. It makes levels unbiased, if a random rotation comes
#: first.
UNBIASED = ScaleRule("unbiased", 3, False, True, False, _deviation, refit=_unbiased_scale)
#: The same for deviations from the mean of the bucket.
CENTRED = ScaleRule(
    "centred", 4, True, True, False, _deviation, centres=True, refit=_unbiased_scale)

#: Nothing clips, zeros are exact, and rounding is unbiased (PTQ of Chen et al., "A Statistical Framework
#: for Low-bitwidth Training of Deep Neural Networks", 2020). Needs two bits and float32 metadata.
ZERO_IN_RANGE = ScaleRule("zero_in_range", 5, True, False, False, _zero_in_range, zero_in_range=True)


def _as_they_are(codes: Tensor, noise: Tensor | None, top: int) -> Tensor:
    return codes


@dataclass(frozen=True, eq=False, repr=False)
class Rounding(Stage):
    """Turns scaled values into integers.

    Attributes:
        round_: ``(u, noise, top code) -> integers``, as floats; may overwrite ``u``. The noise is
            uniform in [0, 1), or None if none is drawn.
        encoding_draws: :attr:`round_` takes noise.
        decoding_draws: :attr:`restore` takes the noise that :attr:`round_` took, drawn again.
        restore: ``(codes, noise, top code) -> factors``; dequantizing multiplies the factors by the
            scale.
        unsigned: it needs unsigned codes.
    """

    round_: Callable[[Tensor, Tensor | None, int], Tensor]
    encoding_draws: bool = False
    decoding_draws: bool = False
    restore: Callable[[Tensor, Tensor | None, int], Tensor] = _as_they_are
    unsigned: bool = False


def _to_nearest(u: Tensor, noise: Tensor | None, top: int) -> Tensor:
    return u.round_()


def _stochastically(u: Tensor, noise: Tensor | None, top: int) -> Tensor:
    """``floor(u) + (noise < u - floor(u))``: the mean over the noise is ``u``."""
    assert noise is not None
    floor = u.floor()
    return floor.add_(noise < u.sub_(floor))


def _with_dither(u: Tensor, noise: Tensor | None, top: int) -> Tensor:
    """``floor(u + noise)``."""
    assert noise is not None
    return u.add_(noise).floor_()


def _without_dither(codes: Tensor, noise: Tensor | None, top: int) -> Tensor:
    """``q + 1/2 - noise``: within half a step of ``u``, uniformly, whatever ``u`` is."""
    assert noise is not None
    return codes.add_(0.5).sub_(noise)


def _between_levels(u: Tensor, noise: Tensor | None, top: int) -> Tensor:
    """``k + (noise < (u - L[k]) / (L[k+1] - L[k]))`` with ``L[k] <= u < L[k+1]``."""
    assert noise is not None
    u = u.clamp_(0, top)
    levels = _companded(torch.arange(top + 1, dtype=u.dtype, device=u.device), None, top)
    below = torch.bucketize(u, levels[1:top], right=True)
    low = levels[below]
    return (noise < (u - low) / (levels[below + 1] - low)).to(u.dtype).add_(below)


def _companded(codes: Tensor, noise: Tensor | None, top: int) -> Tensor:
    """The level ``k**2 / top`` of code ``k``."""
    return codes * codes * (1 / top)


#: Rounds to nearest, ties to even.
NEAREST = Rounding("nearest", 0, _to_nearest)
STOCHASTIC = Rounding("stochastic", 1, _stochastically, encoding_draws=True)
#: Subtractive dither (Roberts, "Picture coding using pseudo-random noise", 1962): decoding subtracts the
#: noise that encoding has added. The variance is a twelfth of a squared step; that of
#: :data:`STOCHASTIC` is a sixth on average.
DITHERED = Rounding(
    "dithered", 2, _with_dither, encoding_draws=True, decoding_draws=True, restore=_without_dither)
#: Stochastic rounding between the levels ``L[k] = k**2 / top``, which lie close together near zero. For
#: probabilities, of which most are far below the largest: the variance of ``u`` is about
#: ``2/3 u / top``. That of :data:`STOCHASTIC` is about ``u`` for small ``u``. Zeros stay zeros.
COMPANDED = Rounding(
    "companded", 3, _between_levels, encoding_draws=True, restore=_companded, unsigned=True)
