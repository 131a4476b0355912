"""Places of buckets, rows and statistics in a tensor, in Triton; loads and stores there."""

# NOTE [ Divisions ]
# Bucket b is in row b // per_row, and element i has statistic i // inner % kinds. Such numbers have 64
# bits, and their division is slow:
# 1. A program divides once, in 64 bits, for its first bucket. All other buckets are at most 2**16
#    elements away, so they divide their distance from the first bucket, in 32 bits. If a period is
#    longer than _LONG, only the distance to its end matters, as if the period were _LONG.
# 2. Statistics of the first slice are found in this way. Each further slice follows from the previous
#    one by additions, because both numbers wrap around at most once. If all of a bucket has one
#    statistic (units is _ONE), nothing changes between slices.

# Triton's own types differ from the types that a checker infers from Python.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from brevitas_bp.kernels.gpu.constants import ONE, SEVERAL
from brevitas_bp.kernels.gpu.floats import load, store

_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_SLICES = tl.constexpr(8)
_ONE = tl.constexpr(ONE)
_SEVERAL = tl.constexpr(SEVERAL)
_LONG = tl.constexpr(1 << 30)


@triton.jit
def _short(period: tl.tensor) -> tl.tensor:
    """Shortens a period as NOTE [ Divisions ] says, int32."""
    return tl.minimum(period, _LONG).to(tl.int32)


@triton.jit
def _within(far: tl.tensor, period: tl.tensor) -> tl.tensor:
    """Returns the distance into a shortened period, int32."""
    return tl.maximum(far - (period - _short(period)), 0).to(tl.int32)


@triton.jit
def place_of(
        first: tl.tensor, number: tl.tensor, n: tl.tensor, row: tl.tensor, size: tl.constexpr,
        buckets: tl.constexpr, rows: tl.constexpr) -> tl.tensor:
    """Returns where the first bucket begins, int64, and how far from there others begin and end.

    These distances are int32 [buckets, 1]. With rows, buckets that do not exist count as the last one.
    Without rows, the ends are left out.
    """
    limit = 0
    if rows:
        per_row = (row + (size - 1)) // size
        of_row = first // per_row
        inside = first - of_row * per_row
        number = tl.minimum(number, tl.minimum(n - 1 - first, buckets).to(tl.int32))
        further = (_within(inside, per_row) + number) // _short(per_row)
        begin = (inside + number - further * per_row) * size
        distance = (further * row + begin - inside * size).to(tl.int32)
        place = of_row * row + inside * size
        limit = (distance + tl.minimum(row - begin, size).to(tl.int32))[:, None]
    else:
        distance, place = number * size, first * size
    return place, distance[:, None], limit


@triton.jit
def limit_of(
        place: tl.tensor, end: tl.tensor, numel: tl.tensor, size: tl.constexpr, buckets: tl.constexpr,
        rows: tl.constexpr) -> tl.tensor:
    """Returns how far from the first bucket the elements of each bucket end, int32."""
    if rows:
        limit = end
    else:
        limit = tl.minimum(numel - place, buckets * size).to(tl.int32)
    return limit


@triton.jit
def first_units(
        place: tl.tensor, distance: tl.tensor, inner: tl.tensor, kinds: tl.tensor,
        units: tl.constexpr) -> tl.tensor:
    """Returns the distance of elements into runs of one statistic, int32, and their statistics, int64.

    The elements lie ``distance`` after ``place``.
    """
    far, kind = 0, 0
    if units > 0:
        run = place // inner
        far = _within(place - run * inner, inner) + distance
        runs = far // _short(inner)
        far -= runs * _short(inner)
        kind = run % kinds + runs % _short(kinds)
        kind = tl.where(kind >= kinds, kind - kinds, kind)
    return far, kind


@triton.jit
def next_units(
        far: tl.tensor, kind: tl.tensor, inner: tl.tensor, kinds: tl.tensor,
        step: tl.constexpr) -> tl.tensor:
    """Works like :func:`first_units`, for the elements that lie ``step`` further."""
    period = _short(inner)
    runs = step // period
    far += step - runs * period
    over = far >= period
    kind += runs % _short(kinds) + over.to(tl.int32)
    return tl.where(over, far - period, far), tl.where(kind >= kinds, kind - kinds, kind)


@triton.jit
def unit_of(kind: tl.tensor, scales: tl.tensor, shifts: tl.tensor) -> tl.tensor:
    """Returns scale and shift of statistics; the shift is 0 if there are no shifts."""
    shift = 0.0
    if shifts is not None:
        shift = tl.load(shifts + kind)
    return tl.load(scales + kind), shift


@triton.jit
def load_slices(
        x: tl.tensor, inside: tl.tensor, lane: tl.tensor, limit: tl.tensor, fill: tl.tensor,
        far: tl.tensor, kind: tl.tensor, scales: tl.tensor, shifts: tl.tensor, inner: tl.tensor,
        kinds: tl.tensor, float_format: tl.constexpr, slice_size: tl.constexpr, units: tl.constexpr,
        padded: tl.constexpr, tail: tl.constexpr) -> tl.tensor:
    """Loads the eight slices of all buckets, normalized; ``fill`` from ``limit`` on."""
    if units == _ONE:
        scale, shift = unit_of(kind, scales, shifts)
    out = ()
    for s in tl.static_range(_SLICES):
        offset = inside + s * slice_size
        if tail:
            mask = (offset < limit) & (lane < slice_size)
        elif padded:
            mask = (lane < slice_size) & (offset >= 0)
        else:
            mask = None
        value = load(x + offset, mask, fill if tail else 0.0, float_format)
        if units == _SEVERAL:
            if s > 0:
                far, kind = next_units(far, kind, inner, kinds, slice_size)
            scale, shift = unit_of(kind, scales, shifts)
        if units > 0:
            # Subtracting +0 is exact, also for -0.
            value = (value - shift) * scale
            if tail:
                value = tl.where(mask, value, fill)
        out = out + (value,)
    return out


@triton.jit
def fill_of(
        x: tl.tensor, place: tl.tensor, limit: tl.tensor, scales: tl.tensor, shifts: tl.tensor,
        inner: tl.tensor, kinds: tl.tensor, pads_with_zero: tl.constexpr, units: tl.constexpr,
        float_format: tl.constexpr) -> tl.tensor:
    """Returns the padding of buckets: zero, or their last element, normalized.

    The tensor continues with ``x`` at ``place``, and ends ``limit`` elements later.
    """
    value = 0.0
    if not pads_with_zero:
        last = limit - 1
        value = load(x + last, None, 0.0, float_format)
        if units > 0:
            _, kind = first_units(place, last, inner, kinds, units)
            scale, shift = unit_of(kind, scales, shifts)
            value = (value - shift) * scale
    return value


@triton.jit
def load_buckets(
        here: tl.tensor, inside: tl.tensor, lane: tl.tensor, place: tl.tensor, limit: tl.tensor,
        numel: tl.tensor, far: tl.tensor, kind: tl.tensor, scales: tl.tensor, shifts: tl.tensor,
        inner: tl.tensor, kinds: tl.tensor, pads_with_zero: tl.constexpr, float_format: tl.constexpr,
        size: tl.constexpr, buckets: tl.constexpr, slice_size: tl.constexpr, rows: tl.constexpr,
        units: tl.constexpr, padded: tl.constexpr) -> tl.tensor:
    """Loads the eight slices of all buckets, padded and normalized; ``here`` is the first bucket."""
    whole = place + buckets * size <= numel
    if rows:
        whole = False
    if whole:
        xs = load_slices(
            here, inside, lane, 0, 0.0, far, kind, scales, shifts, inner, kinds, float_format,
            slice_size, units, padded, False)
    else:
        fill = fill_of(
            here, place, limit, scales, shifts, inner, kinds, pads_with_zero, units, float_format)
        xs = load_slices(
            here, inside, lane, limit, fill, far, kind, scales, shifts, inner, kinds, float_format,
            slice_size, units, padded, True)
    return xs


@triton.jit
def store_slice(
        out: tl.tensor, y: tl.tensor, offset: tl.tensor, lane: tl.tensor, limit: tl.tensor,
        unit: tl.tensor, shift: tl.tensor, shifts: tl.tensor, largest: tl.constexpr,
        float_format: tl.constexpr, slice_size: tl.constexpr, units: tl.constexpr,
        padded: tl.constexpr, tail: tl.constexpr) -> None:
    """Stores a slice of all buckets, normalized; nothing from ``limit`` on."""
    if units > 0:
        y = tl.clamp(y, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL) * unit
        if shifts is not None:
            y = y + shift
    y = tl.clamp(y, -largest, largest, propagate_nan=tl.PropagateNan.ALL)
    if tail:
        store(out + offset, y, (offset < limit) & (lane < slice_size), float_format)
    elif padded:
        store(out + offset, y, (lane < slice_size) & (offset >= 0), float_format)
    else:
        store(out + offset, y, None, float_format)
