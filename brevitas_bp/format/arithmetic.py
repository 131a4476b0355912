"""The arithmetic of a bucket in torch operations: what the formulas of its stages are made of."""

import torch
from torch import Tensor

# A bfloat16 scale may be 2**-7 larger than exact: T * s must stay below the largest float.
RANGE_LIMIT = 1 - 2.0**-6
# Squares summed at once, on CPU and elsewhere: the temporaries of a norm are some ten of such runs.
_RUN, _LARGE_RUN = 1 << 14, 1 << 20


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of ``dtype`` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` rounded towards +inf to a value that the metadata holds, in the dtype of ``x``."""
    return -round_down(-x, dtype)


def round_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` rounded towards -inf to a value that the metadata holds, in the dtype of ``x``.

    Only bfloat16 metadata of float32 computations is rounded, see :func:`stored_metadata_dtype`. NaN
    stays NaN and a finite value stays finite.
    """
    if stored_metadata_dtype(dtype, x.dtype) == x.dtype:
        return x
    bits = x.view(torch.int32)
    truncated = bits & -65536
    # Truncation rounds towards zero; a negative value with lost bits goes one step further.
    further = (bits < 0) & (truncated != bits)
    rounded = (truncated + further.to(torch.int32) * 65536).view(torch.float32)
    rounded = rounded.clamp(min=torch.finfo(torch.bfloat16).min)
    return torch.where(torch.isfinite(x), rounded, x)


def stored_metadata_dtype(metadata_dtype: torch.dtype, computed: torch.dtype) -> torch.dtype:
    """The dtype that scale and offset are stored in.

    ``float32`` stands for the dtype computed in, and float64 data, whose exponents bfloat16 cannot
    hold, always keeps its own.
    """
    return metadata_dtype if computed == torch.float32 else computed


def finite_range(lo: Tensor, hi: Tensor) -> Tensor:
    """``hi - lo``, limited so that finite ends never give Inf; NaN where an end is not finite."""
    width = (hi - lo).clamp(max=torch.finfo(hi.dtype).max * RANGE_LIMIT)
    return torch.where(torch.isfinite(lo) & torch.isfinite(hi), width, torch.nan)


def reciprocal(scale: Tensor) -> Tensor:
    """``1 / scale``, and 0 where the scale is no positive normal number."""
    usable = scale >= torch.finfo(scale.dtype).tiny
    return torch.where(usable, 1 / torch.where(usable, scale, 1), 0)


def largest_magnitude(x: Tensor) -> Tensor:
    """Largest magnitude of each row [n, 1], NaN where there is one; no copy of ``x`` is made."""
    # + 0: the larger of two zeros may be -0.
    return torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)) + 0


def l2_norm(x: Tensor, size: int | None = None) -> Tensor:
    """Norm of each row [n, 1] in the dtype computed in: the same bits on every backend.

    The squares are summed in float64, as a binary tree: while there are ``B`` of them, the ``i``-th is
    added to by the one ``(B + 1) // 2`` later.

    Args:
        x: [n, B].
        size: the tree of rows of ``size`` elements, of which those that ``x`` lacks are zero, and no
            temporary as large as a row; None: the tree of ``x``, at once.
    """
    computed = compute_dtype(x.dtype)
    unit = None
    if computed == torch.float64:
        # Scaled by the peak first, or squares could overflow.
        peak = largest_magnitude(x)
        unit = torch.where(peak > 0, peak, 1)
    total = _sum_of_squares(x, unit, size)
    root = square_root(total)
    return (root if unit is None else root * unit).to(computed)


def square_root(x: Tensor) -> Tensor:
    """The square root of float64 values >= 0, correctly rounded, as IEEE 754 asks for.

    ``torch.sqrt`` of float64 is off by one unit in the last place for some values where it runs in a
    library for vectors. Its result ``s`` is moved to its neighbour where ``x - s**2``, which is computed
    exactly, says that the root lies beyond the middle between the two.
    """
    s = x.sqrt()
    # s**2 is square + rest: Veltkamp's splitting and Dekker's product.
    upper = s * 134217729.0
    upper = upper - (upper - s)
    lower = s - upper
    square = s * s
    rest = ((upper * upper - square) + 2.0 * upper * lower) + lower * lower
    left = (x - square) - rest
    above = torch.nextafter(s, torch.full_like(s, float("inf")))
    below = torch.nextafter(s, torch.zeros_like(s))
    s = torch.where(left > s * (above - s), above, torch.where(left <= -s * (s - below), below, s))
    # Zero, infinity and NaN are their own roots.
    return torch.where((x > 0) & (x < float("inf")), s, x.sqrt())


def _sum_of_squares(x: Tensor, unit: Tensor | None, size: int | None) -> Tensor:
    """The tree from its leaves: runs of elements, of which few are there at a time.

    ``sizes[k]`` elements are left after ``k`` levels. A run of them is made of ``2**k`` runs of ``x``;
    bit ``k`` of the number of a run says whether it is added to another at level ``k``.
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


def finite_norm(norm: Tensor, peak: Tensor) -> Tensor:
    """A symmetric bucket's range: its norm, limited; NaN where its largest element is not finite."""
    limited = norm.clamp(max=torch.finfo(norm.dtype).max * RANGE_LIMIT)
    return torch.where(torch.isfinite(peak), limited, torch.nan)


def integer_offset(lo: Tensor, scale: Tensor) -> Tensor:
    """The offset ``-round(-lo / s) * s``: zero lies on the grid, the ends are clipped.

    Source: Li, 2025, chapters 4 and 5. A constant bucket keeps ``lo``.
    """
    inverse = reciprocal(scale)
    return torch.where(inverse > 0, -torch.round(-lo * inverse) * scale + 0, lo)


def scaled(x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """``(x - offset) / scale``, by the reciprocal of the scale; a new tensor."""
    return (x * 1 if offset is None else x - offset).mul_(reciprocal(scale))


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Values ``codes * scale + offset`` in ``dtype``, finite wherever the scale is."""
    values = codes * scale
    values += 0 if offset is None else offset
    return to_range(values, dtype)


def to_range(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as ``dtype``, finite wherever they are; may destroy them."""
    limit = torch.finfo(dtype).max
    return values.clamp_(-limit, limit).to(dtype)


def to_bytes(codes: Tensor, lowest: int, scale: Tensor) -> Tensor:
    """Float codes to uint8, counted from the lowest; zero where the scale is NaN."""
    stored = (codes - lowest if lowest else codes)
    return torch.where(scale.isnan(), 0, stored).to(torch.uint8)


def to_metadata(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale or offset as stored: one bit pattern for NaN, whichever operation made it."""
    # After the conversion: vector and scalar conversions to bfloat16 disagree about NaN.
    stored = values.to(dtype)
    return torch.where(stored.isnan(), torch.nan, stored)
