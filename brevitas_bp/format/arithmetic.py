"""Arithmetic of one bucket in torch operations: the building blocks of the stage formulas."""

import math

import torch
from torch import Tensor

# Rounding to bfloat16 can enlarge a scale by 2**-7. This limit keeps T * s, the top code times the
# scale, below the largest float.
RANGE_LIMIT = 1 - 2.0**-6
#: Share of the largest float to which :func:`zero_in_range` limits both ends of a range.
LARGEST_END = 0.25
# A norm sums this many squares at once, on CPU and elsewhere. Its temporaries take about ten times as
# much memory.
_RUN, _LARGE_RUN = 1 << 14, 1 << 20


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that values of ``dtype`` are computed in: the compute dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts ``x`` to a dtype, in which finite numbers stay finite; infinity and NaN stay as they are."""
    if dtype == x.dtype:
        return x
    limit = torch.finfo(dtype).max
    return torch.where(x.isinf(), x, x.clamp(-limit, limit)).to(dtype)


def round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds ``x`` towards +inf to a value that the metadata dtype holds; keeps the dtype of ``x``."""
    return -round_down(-x, dtype)


def round_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds ``x`` towards -inf to a value that the metadata dtype holds; keeps the dtype of ``x``.

    Only bfloat16 metadata of float32 computations are rounded, see :func:`stored_metadata_dtype`. NaN
    stays NaN, and a finite value stays finite.
    """
    if stored_metadata_dtype(dtype, x.dtype) == x.dtype:
        return x
    bits = x.view(torch.int32)
    truncated = bits & -65536
    # Truncation rounds towards zero. A negative value that lost bits goes one step further.
    further = (bits < 0) & (truncated != bits)
    rounded = (truncated + further.to(torch.int32) * 65536).view(torch.float32)
    rounded = rounded.clamp(min=torch.finfo(torch.bfloat16).min)
    return torch.where(torch.isfinite(x), rounded, x)


def stored_metadata_dtype(metadata_dtype: torch.dtype, computed: torch.dtype) -> torch.dtype:
    """Returns the dtype that scale and offset are stored in.

    ``float32`` means the compute dtype. float64 data always stores its metadata in float64, because
    bfloat16 cannot hold its exponents.
    """
    return metadata_dtype if computed == torch.float32 else computed


def finite_range(lo: Tensor, hi: Tensor) -> Tensor:
    """Returns ``hi - lo``, limited so that finite ends never give Inf; NaN if an end is not finite."""
    width = (hi - lo).clamp(max=torch.finfo(hi.dtype).max * RANGE_LIMIT)
    return torch.where(torch.isfinite(lo) & torch.isfinite(hi), width, torch.nan)


def reciprocal(scale: Tensor) -> Tensor:
    """Returns ``1 / scale``, or 0 if the scale is not a positive normal number."""
    usable = scale >= torch.finfo(scale.dtype).tiny
    return torch.where(usable, 1 / torch.where(usable, scale, 1), 0)


def largest_magnitude(x: Tensor) -> Tensor:
    """Returns the largest magnitude of each bucket [n, 1], NaN if it holds NaN; does not copy ``x``."""
    # Adding 0 turns -0 into 0: the larger of two zeros may be -0.
    return torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)) + 0


def l2_norm(x: Tensor, size: int | None = None) -> Tensor:
    """Returns the norm of each bucket [n, 1] in the compute dtype: the same bits on every backend.

    The squares are summed in float64, as a binary tree. While ``B`` terms are left, term
    ``i + (B + 1) // 2`` is added to term ``i``.

    Args:
        x: [n, B].
        size: elements of a full bucket. The sum follows the tree of ``size`` elements; elements that
            ``x`` lacks count as zero. No temporary is as large as a bucket. None: the tree of ``x``,
            computed at once.
    """
    computed = compute_dtype(x.dtype)
    unit = None
    if computed == torch.float64:
        # Divide by the peak first: squares could overflow.
        peak = largest_magnitude(x)
        unit = torch.where(peak > 0, peak, 1)
    total = _sum_of_squares(x, unit, size)
    root = square_root(total)
    return (root if unit is None else root * unit).to(computed)


def square_root(x: Tensor) -> Tensor:
    """Returns the square root of float64 values >= 0, correctly rounded as IEEE 754 requires.

    ``torch.sqrt`` of float64 is off by one unit in the last place for some values when it runs in a
    vector library. This function starts from that result ``s`` and computes ``x - s**2`` exactly. If
    the root lies beyond the midpoint between ``s`` and a neighbour, it takes the neighbour.
    """
    s = x.sqrt()
    # s**2 equals square + rest: Veltkamp's splitting and Dekker's product.
    upper = s * 134217729.0
    upper = upper - (upper - s)
    lower = s - upper
    square = s * s
    rest = ((upper * upper - square) + 2.0 * upper * lower) + lower * lower
    left = (x - square) - rest
    above = torch.nextafter(s, torch.full_like(s, float("inf")))
    below = torch.nextafter(s, torch.zeros_like(s))
    s = torch.where(left > s * (above - s), above, torch.where(left <= -s * (s - below), below, s))
    # Zero, infinity and NaN are their own square roots.
    return torch.where((x > 0) & (x < float("inf")), s, x.sqrt())


def _sum_of_squares(x: Tensor, unit: Tensor | None, size: int | None) -> Tensor:
    """Sums the tree of :func:`l2_norm` from its leaves, with few runs of elements in memory at a time.

    After ``k`` levels, ``sizes[k]`` elements are left. A run of them is made of ``2**k`` runs of ``x``.
    Bit ``k`` of the number of a run says whether the run is added to another run at level ``k``.
    """
    sizes, longest = [size or x.shape[-1]], _RUN if x.device.type == "cpu" else _LARGE_RUN
    while size is not None and sizes[-1] > longest:
        sizes.append((sizes[-1] + 1) // 2)
    depth, sums = len(sizes) - 1, []
    for run in range(1 << depth):
        start, count = 0, sizes[-1]
        for level in reversed(range(depth)):
            if run >> level & 1:
                start += sizes[level + 1]
                count = min(count, sizes[level] - start)
        total = x[:, start:start + max(count, 0)].to(torch.float64)
        total = (total if unit is None else total / unit).square()
        level = 0
        while run >> level & 1:
            total = _add_to_front(sums.pop(), total)
            level += 1
        sums.append(total)
    total = sums.pop()
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
        total = _add_to_front(total[:, :sizes[-1]], total[:, sizes[-1]:])
    return total


def _add_to_front(longer: Tensor, shorter: Tensor) -> Tensor:
    return longer + torch.nn.functional.pad(shorter, (0, longer.shape[-1] - shorter.shape[-1]))


def tree_sum(x: Tensor) -> Tensor:
    """Returns the sum of each bucket [n, 1] in its own dtype: the same bits on every backend.

    While ``B`` terms are left, term ``i + (B + 1) // 2`` is added to term ``i``.
    """
    while x.shape[-1] > 1:
        half = (x.shape[-1] + 1) // 2
        x = _add_to_front(x[:, :half], x[:, half:])
    return x


def unit_of(peak: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a power of two near a magnitude, and its reciprocal. Both are normal numbers.

    Divided by the unit, the largest magnitude of a bucket is below 4. It is 1 or more, unless it is a
    subnormal number. Products with units are exact, so they change no relative error. Sums of squares
    in units neither overflow nor underflow.
    """
    double = peak.dtype == torch.float64
    integer, mantissa, top = (torch.int64, 52, 2046) if double else (torch.int32, 23, 254)
    exponent = (peak.contiguous().view(integer) >> mantissa).clamp(1, top - 1)
    return (exponent << mantissa).view(peak.dtype), ((top - exponent) << mantissa).view(peak.dtype)


def mean_about_first(x: Tensor, counts: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Returns the means [n, 1] of the first elements of buckets; exact if all elements are equal.

    Args:
        x: buckets in units [n, B].
        counts: elements that count, [n, 1].
        unit: see :func:`unit_of`.
        inverse: of the unit.
    """
    first = x[:, :1]
    inside = torch.arange(x.shape[-1], device=x.device) < counts
    return (first + tree_sum(torch.where(inside, x - first, 0)) / counts.to(x.dtype)) * unit


def to_nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds ``x`` to the nearest finite value that the metadata dtype holds; keeps its own dtype."""
    stored = stored_metadata_dtype(dtype, x.dtype)
    limit = torch.finfo(stored).max
    return x.to(stored).to(x.dtype).clamp(-limit, limit)


def to_random(x: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """Rounds ``x >= 0`` up or down at random to what the metadata dtype holds, without bias.

    Args:
        x: [n, 1], in the compute dtype, which is kept.
        dtype: the metadata dtype.
        words: 32 random bits of each bucket, int32 [n, 1].
    """
    if stored_metadata_dtype(dtype, x.dtype) == x.dtype:
        return x.clamp(max=torch.finfo(x.dtype).max)
    rounded = ((x.view(torch.int32) + (words & 0xFFFF)) & -65536).view(torch.float32)
    return torch.where(x.isnan(), x, rounded.clamp(max=torch.finfo(torch.bfloat16).max))


def finite_norm(norm: Tensor, peak: Tensor) -> Tensor:
    """Returns the range of a symmetric bucket: its norm, limited; NaN if its peak is not finite."""
    limited = norm.clamp(max=torch.finfo(norm.dtype).max * RANGE_LIMIT)
    return torch.where(torch.isfinite(peak), limited, torch.nan)


def integer_offset(lo: Tensor, scale: Tensor) -> Tensor:
    """Returns the offset ``-round(-lo / s) * s``: zero lies on the grid, and the ends are clipped.

    Source: Li, 2025, chapters 4 and 5. A constant bucket keeps ``lo``.
    """
    inverse = reciprocal(scale)
    return torch.where(inverse > 0, -torch.round(-lo * inverse) * scale + 0, lo)


def zero_in_range(lo: Tensor, hi: Tensor, top: Tensor | float) -> tuple[Tensor, Tensor]:
    """Returns the smallest scale for which zero is on the grid and nothing clips, and the offset.

    The range is stretched to contain 0. The code of zero is ``z = floor(-lo * top / (hi - lo))``, at
    least 1 and at most ``top - 1`` if both signs occur; it is 0 or ``top`` if only one does. The scale
    is ``max(-lo / z, hi / (top - z))``, and the offset ``-z * scale``. A bucket whose scale is no normal
    number gets the offset 0. Ends beyond a quarter of the largest float are clipped there: then no code
    stands for more than the largest float.

    Args:
        lo: smallest element of each bucket, [n, 1].
        hi: largest element; NaN or Inf in one of the two gives NaN.
        top: top code, 2 or more.
    """
    limit = torch.finfo(lo.dtype).max * LARGEST_END
    low, high = -lo.clamp(-limit, 0) + 0, hi.clamp(0, limit) + 0
    below, above = low / top, high / top
    zero = torch.floor(below * reciprocal(below + above) * top)
    zero = torch.minimum(zero.clamp_min(1), torch.zeros_like(zero) + (top - 1))
    zero = torch.where(low == 0, 0, torch.where(high == 0, top, zero)).to(low.dtype)
    scale = torch.maximum(low / zero.clamp_min(1), high / (top - zero).clamp_min(1))
    finite = torch.isfinite(lo) & torch.isfinite(hi)
    usable = scale >= torch.finfo(scale.dtype).tiny
    return (
        torch.where(finite, scale, torch.nan),
        torch.where(finite, torch.where(usable, -zero * scale + 0, 0), torch.nan))


def scaled(x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Returns ``(x - offset) / scale`` as a new tensor; multiplies by the reciprocal of the scale."""
    return (x * 1 if offset is None else x - offset).mul_(reciprocal(scale))


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns values ``codes * scale + offset`` in ``dtype``, finite wherever the scale is finite."""
    values = codes * scale
    values += 0 if offset is None else offset
    return to_range(values, dtype)


def to_range(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Clamps values to the finite range of ``dtype`` and converts them; may overwrite ``values``."""
    limit = torch.finfo(dtype).max
    return values.clamp_(-limit, limit).to(dtype)


def to_bytes(codes: Tensor, lowest: int, scale: Tensor) -> Tensor:
    """Converts float codes to uint8, counted from the lowest code; zero if the scale is NaN."""
    stored = (codes - lowest if lowest else codes)
    return torch.where(scale.isnan(), 0, stored).to(torch.uint8)


def to_metadata(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts scales or offsets to their stored dtype, with one bit pattern for every NaN."""
    # Replace NaN after the conversion: vector and scalar conversions to bfloat16 give NaN different
    # bits.
    stored = values.to(dtype)
    return torch.where(stored.isnan(), torch.nan, stored)


def exponent_of(x: Tensor) -> Tensor:
    """Returns the binary logarithm of magnitudes, up to 1e-7 and rounding; equal on every processor.

    Zero gives -inf. Infinity and NaN stay as they are. torch's own logarithm differs between processors
    in its last bits.
    """
    mantissa, exponent = torch.frexp(x)
    r = (mantissa - ROOT).div_(mantissa.add_(ROOT))
    square = r * r
    total = (square * LOG2[-1]).add_(LOG2[-2])
    for coefficient in LOG2[-3::-1]:
        total.mul_(square).add_(coefficient)
    total.mul_(r).add_(exponent.to(x.dtype).sub_(0.5))
    if x.device.type == "cpu" and bool(x.min() > 0) and bool(x.max() < torch.inf):
        return total
    return torch.where(x.isfinite() & (x > 0), total, torch.where(x == 0, -torch.inf, x))


def power_of_two(x: Tensor) -> Tensor:
    """Returns ``2 ** x``, up to 2e-7 and rounding; equal on every processor, and exact for integers.

    ``x`` may give subnormal numbers and infinity, but lies within twice the exponents of its dtype.
    """
    whole = x.round()
    f = x - whole
    total = (f * EXP2[-1]).add_(EXP2[-2])
    for coefficient in EXP2[-3::-1]:
        total.mul_(f).add_(coefficient)
    # Two factors, because one might overflow where the result does not.
    half = (whole * 0.5).floor_()
    return total.mul_(_whole_power(half)).mul_(_whole_power(whole.sub_(half)))


# log2(m) = -1/2 + 2 / ln 2 (r + r**3 / 3 + ...), r = (m - sqrt(1/2)) / (m + sqrt(1/2)).
ROOT = math.sqrt(0.5)
LOG2 = [2 / math.log(2) / k for k in (1, 3, 5, 7)]
# 2**f = 1 + f ln 2 + (f ln 2)**2 / 2 + ...
EXP2 = [math.log(2) ** k / math.factorial(k) for k in range(7)]


def _whole_power(whole: Tensor) -> Tensor:
    """Returns powers of two that are normal numbers, from their bits."""
    if whole.dtype == torch.float64:
        return whole.to(torch.int64).add_(1023).bitwise_left_shift_(52).view(torch.float64)
    return whole.to(torch.int32).add_(127).bitwise_left_shift_(23).view(torch.float32)
