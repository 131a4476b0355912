"""The Triton functions of :mod:`brevitas_bp.kernels.gpu.launch`: a program handles a few buckets.

Shapes: [buckets] for what a bucket has once; [buckets, lanes] for a slice of each bucket, where lanes
are the elements of a slice padded to a power of two. Tuples hold the eight slices of each bucket, or
the lines of bytes (as many as a slice has elements) that a width needs.

Two switches of a kernel cost nothing where they are off. ``rows``: buckets end with rows of ``row``
elements, which they do not fill. ``units``: values are normalized, with one or several statistics in a
bucket; there are ``kinds`` of them, ``scales`` and ``shifts``.
"""

# NOTE [ The device and Triton's interpreter ]
# The tests on CPU run these kernels in Triton's interpreter, which is numpy. Where a device may
# compute something else, the kernels do not leave it to chance:
# 1. Contraction to fused multiply-add is switched off at launch (``enable_fp_fusion`` in gpu.py).
# 2. ``/`` is an approximation on float32: divisions are ``div_rn``. Subnormal numbers are kept.
# 3. ``tl.minimum`` of a NaN is the other operand on a device and NaN in numpy. Ranges say
#    ``PropagateNan.ALL``, and are reduced as sortable integers; elsewhere a NaN's result is replaced.
# 4. Arithmetic makes NaNs of other bits on a device. Stored ones are written as integer constants.
# 5. The interpreter rounds to bfloat16 wrongly, so that conversion is integer arithmetic.
# 6. ``tl.floor`` flushes subnormal numbers on a device. Rounding is done by additions.

# NOTE [ Divisions ]
# Bucket b is in row b // per_row, and element i has statistic i // inner % kinds. Such numbers are 64
# bits wide, and their division is slow:
# 1. A program divides once, in 64 bits, for its first bucket. All others are at most 2**16 elements
#    away: they divide their distance from there, in 32 bits. Of a period that is longer than _LONG only
#    the distance to its end matters, as if it were _LONG.
# 2. Statistics are found so for the first slice; each further one is reached from the one before by
#    additions: both numbers wrap around at most once. Where all of a bucket has one statistic (units is
#    _ONE), nothing changes from slice to slice.

# Triton's own types are not those that a checker infers from Python.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from brevitas_bp.format.arithmetic import RANGE_LIMIT
from brevitas_bp.format.random import HASH_LAST_SHIFT, HASH_ROUNDS, NOISE_BITS, NOISE_STEP

_FLOAT32 = torch.finfo(torch.float32)
_LARGEST = tl.constexpr(_FLOAT32.max)
_LIMIT = tl.constexpr(_FLOAT32.max * RANGE_LIMIT)
_TINY = tl.constexpr(_FLOAT32.tiny)
_BF16_MIN = tl.constexpr(torch.finfo(torch.bfloat16).min)
_SIGN = tl.constexpr(-(1 << 31))
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_INF_BITS = tl.constexpr(0x7F800000)
_NAN_BITS = tl.constexpr(0x7FC00000)
_NAN_BITS_16 = tl.constexpr(0x7E00)
# Added to a float of less than 2**22 it rounds to the nearest integer, ties to even, and leaves that
# integer in the low bits. Conversion instructions run at a fraction of the rate of additions.
_MAGIC = tl.constexpr(1.5 * 2**23)
_MAGIC_BITS = tl.constexpr(0x4B400000)
_S0, _M0 = tl.constexpr(HASH_ROUNDS[0][0]), tl.constexpr(HASH_ROUNDS[0][1])
_S1, _M1 = tl.constexpr(HASH_ROUNDS[1][0]), tl.constexpr(HASH_ROUNDS[1][1])
_S2, _M2 = tl.constexpr(HASH_ROUNDS[2][0]), tl.constexpr(HASH_ROUNDS[2][1])
_S3 = tl.constexpr(HASH_LAST_SHIFT)
_TO_NOISE = tl.constexpr(32 - NOISE_BITS)
_STEP = tl.constexpr(NOISE_STEP)
_SLICES = tl.constexpr(8)
# Rules (1 is max) and formats (0 is float32), numbered as in gpu.py.
_MIN_MAX, _L2 = tl.constexpr(0), tl.constexpr(2)
_F16, _BF16 = tl.constexpr(1), tl.constexpr(2)
# Statistics of a bucket (0 where values are not normalized), numbered as in gpu.py.
_ONE, _SEVERAL = tl.constexpr(1), tl.constexpr(2)
_LONG = tl.constexpr(1 << 30)
# Of which a kernel is not compiled for each kind.
_NUMBERS = ["numel", "n", "mixed", "multiplier", "shift", "row", "inner", "kinds"]


@triton.jit
def _float(bits: tl.tensor) -> tl.tensor:
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bits(x: tl.tensor) -> tl.tensor:
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _load(pointer: tl.tensor, mask: tl.tensor, other: tl.tensor, form: tl.constexpr) -> tl.tensor:
    """Loads floats of a format as float32; bfloat16 is the upper half of one."""
    if form == _BF16:
        half = tl.load(pointer.to(tl.pointer_type(tl.int16), bitcast=True), mask)
        x = _float(half.to(tl.int32) << 16)
    else:
        x = tl.load(pointer, mask).to(tl.float32)
    if mask is not None:
        x = tl.where(mask, x, other)
    return x


@triton.jit
def _store(pointer: tl.tensor, x: tl.tensor, mask: tl.tensor, form: tl.constexpr) -> None:
    """Stores float32 in a format, to nearest; there is one bit pattern for NaN."""
    nan = x != x
    if form == _F16:
        half = x.to(tl.float16).to(tl.int16, bitcast=True)
        half = tl.where(nan, tl.full(half.shape, _NAN_BITS_16, tl.int16), half)
        tl.store(pointer.to(tl.pointer_type(tl.int16), bitcast=True), half, mask)
    else:
        bits = _bits(x)
        if form == _BF16:
            bits = bits + (((bits >> 16) & 1) + 0x7FFF)
        bits = tl.where(nan, _NAN_BITS, bits)
        if form == _BF16:
            half = (bits >> 16).to(tl.int16)
            tl.store(pointer.to(tl.pointer_type(tl.int16), bitcast=True), half, mask)
        else:
            tl.store(pointer.to(tl.pointer_type(tl.int32), bitcast=True), bits, mask)


@triton.jit
def _short(period: tl.tensor) -> tl.tensor:
    """A period as NOTE [ Divisions ] shortens it, int32."""
    return tl.minimum(period, _LONG).to(tl.int32)


@triton.jit
def _within(far: tl.tensor, period: tl.tensor) -> tl.tensor:
    """How far something is within a shortened period, int32."""
    return tl.maximum(far - (period - _short(period)), 0).to(tl.int32)


@triton.jit
def _place(
        first: tl.tensor, number: tl.tensor, n: tl.tensor, row: tl.tensor, size: tl.constexpr,
        buckets: tl.constexpr, rows: tl.constexpr) -> tl.tensor:
    """Where the first bucket begins, int64; how far from there others begin and end, int32 [buckets, 1].

    In rows, those that do not exist are taken for the last one; without, ends are left out.
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
def _first_units(
        place: tl.tensor, distance: tl.tensor, inner: tl.tensor, kinds: tl.tensor,
        units: tl.constexpr) -> tl.tensor:
    """How far elements are within runs of one statistic, int32, and their statistics, int64.

    They lie ``distance`` after ``place``.
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
def _next_units(
        far: tl.tensor, kind: tl.tensor, inner: tl.tensor, kinds: tl.tensor,
        step: tl.constexpr) -> tl.tensor:
    """As :func:`_first_units`, of the elements that lie ``step`` further."""
    period = _short(inner)
    runs = step // period
    far += step - runs * period
    over = far >= period
    kind += runs % _short(kinds) + over.to(tl.int32)
    return tl.where(over, far - period, far), tl.where(kind >= kinds, kind - kinds, kind)


@triton.jit
def _unit(kind: tl.tensor, scales: tl.tensor, shifts: tl.tensor) -> tl.tensor:
    """Scale and shift of statistics; the shift is 0 where there are none."""
    shift = 0.0
    if shifts is not None:
        shift = tl.load(shifts + kind)
    return tl.load(scales + kind), shift


@triton.jit
def _load_slices(
        x: tl.tensor, inside: tl.tensor, lane: tl.tensor, limit: tl.tensor, fill: tl.tensor,
        far: tl.tensor, kind: tl.tensor, scales: tl.tensor, shifts: tl.tensor, inner: tl.tensor,
        kinds: tl.tensor, form: tl.constexpr, slice_size: tl.constexpr, units: tl.constexpr,
        padded: tl.constexpr, tail: tl.constexpr) -> tl.tensor:
    """The eight slices of all buckets, normalized; ``fill`` from ``limit`` on."""
    if units == _ONE:
        scale, shift = _unit(kind, scales, shifts)
    out = ()
    for s in tl.static_range(_SLICES):
        offset = inside + s * slice_size
        if tail:
            mask = (offset < limit) & (lane < slice_size)
        elif padded:
            mask = (lane < slice_size) & (offset >= 0)
        else:
            mask = None
        value = _load(x + offset, mask, fill if tail else 0.0, form)
        if units == _SEVERAL:
            if s > 0:
                far, kind = _next_units(far, kind, inner, kinds, slice_size)
            scale, shift = _unit(kind, scales, shifts)
        if units > 0:
            # Less +0 is exact, also of -0.
            value = (value - shift) * scale
            if tail:
                value = tl.where(mask, value, fill)
        out = out + (value,)
    return out


@triton.jit
def _fill(
        x: tl.tensor, place: tl.tensor, limit: tl.tensor, scales: tl.tensor, shifts: tl.tensor,
        inner: tl.tensor, kinds: tl.tensor, rule: tl.constexpr, units: tl.constexpr,
        form: tl.constexpr) -> tl.tensor:
    """What buckets are padded with: zero, or their last element, normalized.

    The tensor goes on with ``x`` at ``place``, and ends ``limit`` elements later.
    """
    value = 0.0
    if rule != _L2:
        last = limit - 1
        value = _load(x + last, None, 0.0, form)
        if units > 0:
            _, kind = _first_units(place, last, inner, kinds, units)
            scale, shift = _unit(kind, scales, shifts)
            value = (value - shift) * scale
    return value


@triton.jit
def _key(x: tl.tensor) -> tl.tensor:
    """Bits of a float, ordered as integers; NaN above infinity."""
    bits = tl.where(x != x, _NAN_BITS, _bits(x))
    return bits ^ ((bits >> 31) & _MAGNITUDE)


@triton.jit
def _from_key(key: tl.tensor) -> tl.tensor:
    return _float(key ^ ((key >> 31) & _MAGNITUDE))


@triton.jit
def _round_down_bf16(x: tl.tensor) -> tl.tensor:
    """See ``arithmetic.round_down``."""
    bits = _bits(x)
    truncated = bits & -65536
    further = (bits < 0) & (truncated != bits)
    return tl.maximum(_float(tl.where(further, truncated + 65536, truncated)), _BF16_MIN)


@triton.jit
def _round_half_even(x: tl.tensor) -> tl.tensor:
    """To nearest, ties to even, at any magnitude."""
    size = tl.abs(x)
    rounded = tl.where(size < 2.0**23, (size + 2.0**23) - 2.0**23, size)
    return tl.where(x < 0, -rounded, rounded)


@triton.jit
def _add_upper_half(
        total: tl.tensor, lane: tl.tensor, left: tl.constexpr, buckets: tl.constexpr,
        lanes: tl.constexpr) -> tl.tensor:
    """Adds the upper half of the first ``left`` columns to the lower, which is the longer."""
    partner = lane + (left + 1) // 2
    index = tl.broadcast_to(tl.minimum(partner, lanes - 1), [buckets, lanes])
    return total + tl.where(partner < left, tl.gather(total, index, axis=1), 0.0)


@triton.jit
def _squares(xs: tl.tuple) -> tl.tuple:
    out = ()
    for s in tl.static_range(_SLICES):
        x = xs[s].to(tl.float64)
        out = out + (x * x,)
    return out


@triton.jit
def _norm(
        xs: tl.tuple, lane: tl.tensor, buckets: tl.constexpr, slice_size: tl.constexpr,
        lanes: tl.constexpr, levels: tl.constexpr) -> tl.tensor:
    """See ``arithmetic.l2_norm``: the same binary tree."""
    squares = _squares(xs)
    # The first three halvings add whole slices.
    a0 = (squares[0] + squares[4]) + (squares[2] + squares[6])
    a1 = (squares[1] + squares[5]) + (squares[3] + squares[7])
    total = a0 + a1
    if slice_size == lanes:
        for level in tl.static_range(levels):
            total = tl.sum(tl.reshape(total, [buckets, 2, lanes >> (level + 1)]), axis=1)
        total = tl.reshape(total, [buckets])
    else:
        for level in tl.static_range(levels):
            # ceil(slice_size / 2**level) sums are left.
            total = _add_upper_half(
                total, lane, (slice_size + (1 << level) - 1) >> level, buckets, lanes)
        total = tl.sum(tl.where(lane == 0, total, 0.0), axis=1)
    return tl.sqrt(total).to(tl.float32)


@triton.jit
def _metadata(
        xs: tl.tuple, lane: tl.tensor, top: tl.tensor, buckets: tl.constexpr,
        slice_size: tl.constexpr, lanes: tl.constexpr, levels: tl.constexpr, rule: tl.constexpr,
        integer: tl.constexpr, bf16: tl.constexpr) -> tl.tensor:
    """Scale, its reciprocal, offset, and whether a bucket holds NaN or Inf, each [buckets]."""
    if rule == _MIN_MAX:
        low, high = xs[0], xs[0]
        for s in tl.static_range(1, _SLICES):
            low = tl.minimum(low, xs[s], propagate_nan=tl.PropagateNan.ALL)
            high = tl.maximum(high, xs[s], propagate_nan=tl.PropagateNan.ALL)
        # A NaN is in both, and lies above every number.
        low_key = tl.min(tl.where(lane < slice_size, _key(low), _MAGNITUDE), axis=1)
        high_key = tl.max(tl.where(lane < slice_size, _key(high), _SIGN), axis=1)
        broken = (low_key <= ~_INF_BITS) | (high_key >= _INF_BITS)
        lo = _from_key(low_key) + 0.0
        hi = _from_key(high_key) + 0.0
        if bf16:
            lo = _round_down_bf16(lo)
        reach = hi - lo
    else:
        peak = tl.abs(xs[0])
        for s in tl.static_range(1, _SLICES):
            peak = tl.maximum(peak, tl.abs(xs[s]), propagate_nan=tl.PropagateNan.ALL)
        peak_key = tl.max(tl.where(lane < slice_size, _key(peak), 0), axis=1)
        broken = peak_key >= _INF_BITS
        lo = tl.zeros([buckets], tl.float32)
        if rule == _L2:
            reach = _norm(xs, lane, buckets, slice_size, lanes, levels)
        else:
            reach = _from_key(peak_key)
    scale = tl.div_rn(tl.minimum(reach, _LIMIT), top)
    if bf16:
        scale = -_round_down_bf16(-scale)
    usable = scale >= _TINY
    inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, scale, 1.0)), 0.0)
    if integer:
        rounded = -_round_half_even(-lo * inverse)
        lo = tl.where(inverse > 0, rounded * scale + 0.0, lo)
    nan = _float(tl.full([buckets], _NAN_BITS, tl.int32))
    return tl.where(broken, nan, scale), inverse, tl.where(broken, nan, lo), broken


@triton.jit
def _noise(index: tl.tensor, k0: tl.tensor, k1: tl.tensor) -> tl.tensor:
    """See ``random.uniform_``; ``index`` is uint32."""
    h = index + k0
    h = (h ^ (h >> _S0)) * _M0
    h = h ^ k1
    h = (h ^ (h >> _S1)) * _M1
    h = (h ^ (h >> _S2)) * _M2
    h = h ^ (h >> _S3)
    return (h >> _TO_NOISE).to(tl.int32).to(tl.float32) * _STEP


@triton.jit
def _locate(
        bucket: tl.tensor, n: tl.tensor, mixed: tl.tensor, multiplier: tl.tensor, shift: tl.tensor,
        size: tl.constexpr, width: tl.constexpr, mix_width: tl.constexpr) -> tl.tensor:
    """Which buckets have the second width, and where the bytes of each begin."""
    nbytes: tl.constexpr = size * width // 8
    if mix_width == 0:
        is_mixed, start = bucket < 0, bucket * nbytes
    else:
        mix_nbytes: tl.constexpr = size * mix_width // 8
        slot = (multiplier * bucket + shift) % n
        is_mixed = slot < mixed
        start = tl.where(
            is_mixed, slot * mix_nbytes, mixed * mix_nbytes + (slot - mixed) * nbytes)
    return is_mixed, start


# Planes of 8, 4, 2 and 1 bits, the widest first. The bits of the width above those of a plane come
# before it, in the code and (times the size of a slice) in the bytes.


@triton.jit
def _pack_plane(
        codes: tl.tuple, pointer: tl.tensor, broken: tl.tensor, mask: tl.tensor, bits: tl.constexpr,
        first: tl.constexpr, slice_size: tl.constexpr) -> None:
    for t in tl.static_range(bits):
        byte = (codes[t] >> first) & ((1 << bits) - 1)
        for i in tl.static_range(1, 8 // bits):
            byte = byte | (((codes[t + i * bits] >> first) & ((1 << bits) - 1)) << (bits * i))
        byte = tl.where(broken, 0, byte).to(tl.uint8)
        tl.store(pointer + (first + t) * slice_size, byte, mask)


@triton.jit
def _pack(
        codes: tl.tuple, pointer: tl.tensor, broken: tl.tensor, mask: tl.tensor,
        width: tl.constexpr, slice_size: tl.constexpr) -> None:
    """Stores the planes of all buckets; ``pointer`` is at byte ``lane`` of each."""
    for p in tl.static_range(4):
        if width & (8 >> p):
            _pack_plane(
                codes, pointer, broken, mask, 8 >> p, width & -(16 >> p), slice_size)


@triton.jit
def _load_planes(
        pointer: tl.tensor, mask: tl.tensor, width: tl.constexpr,
        slice_size: tl.constexpr) -> tl.tensor:
    """The ``width`` lines of ``slice_size`` bytes of each bucket, as integers."""
    out = ()
    for t in tl.static_range(width):
        out = out + (tl.load(pointer + t * slice_size, mask, 0).to(tl.int32),)
    return out


@triton.jit
def _unpack_plane(
        lines: tl.tuple, s: tl.constexpr, bits: tl.constexpr, first: tl.constexpr) -> tl.tensor:
    part = lines[first + s % bits] >> (bits * (s // bits))
    return (part & ((1 << bits) - 1)) << first


@triton.jit
def _unpack(lines: tl.tuple, s: tl.constexpr, width: tl.constexpr) -> tl.tensor:
    """Codes of slice ``s``."""
    code = tl.zeros_like(lines[0])
    for p in tl.static_range(4):
        if width & (8 >> p):
            code = code | _unpack_plane(lines, s, 8 >> p, width & -(16 >> p))
    return code


@triton.jit(
    do_not_specialize=[*_NUMBERS, "k0", "k1"], do_not_specialize_on_alignment=["scales", "shifts"])
def encode_kernel(
        x: tl.tensor, payload: tl.tensor, metadata: tl.tensor, numel: tl.int64,
        n: tl.int64, mixed: tl.int64, multiplier: tl.int64, shift: tl.int64, k0: tl.int32,
        k1: tl.int32, row: tl.int64, scales: tl.tensor, shifts: tl.tensor, inner: tl.int64,
        kinds: tl.int64, size: tl.constexpr, buckets: tl.constexpr, lanes: tl.constexpr,
        levels: tl.constexpr, width: tl.constexpr, mix_width: tl.constexpr, top: tl.constexpr,
        mix_top: tl.constexpr, signed: tl.constexpr, rule: tl.constexpr, integer: tl.constexpr,
        stochastic: tl.constexpr, rows: tl.constexpr, units: tl.constexpr, form: tl.constexpr,
        meta_form: tl.constexpr) -> None:
    """Encodes ``buckets`` buckets; ``mix_width`` is 0 where all have one width."""
    slice_size: tl.constexpr = size // 8
    padded: tl.constexpr = slice_size != lanes
    numel, n, mixed = numel.to(tl.int64), n.to(tl.int64), mixed.to(tl.int64)
    row, inner, kinds = row.to(tl.int64), inner.to(tl.int64), kinds.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * buckets
    number = tl.arange(0, buckets)
    lane = tl.arange(0, lanes)[None, :]
    bucket = first + number
    is_mixed, start = _locate(
        bucket, n, mixed, multiplier.to(tl.int64), shift.to(tl.int64), size, width, mix_width)
    # Offsets within the program are 32 bits wide, its place in the tensor is 64.
    place, distance, end = _place(first, number, n, row, size, buckets, rows)
    here, inside = x + place, distance + lane
    far, kind = _first_units(
        place, inside if units == _SEVERAL else distance, inner, kinds, units)
    whole = place + buckets * size <= numel
    if rows:
        whole = False
    if whole:
        xs = _load_slices(
            here, inside, lane, 0, 0.0, far, kind, scales, shifts, inner, kinds, form,
            slice_size, units, padded, False)
    else:
        limit = end if rows else (numel - place).to(tl.int32)
        fill = _fill(here, place, limit, scales, shifts, inner, kinds, rule, units, form)
        xs = _load_slices(
            here, inside, lane, limit, fill, far, kind, scales, shifts, inner, kinds, form,
            slice_size, units, padded, True)

    tops = tl.where(is_mixed, mix_top, top).to(tl.float32)
    scale, inverse, lo, broken = _metadata(
        xs, lane, tops, buckets, slice_size, lanes, levels, rule, integer, meta_form == _BF16)
    exists = bucket < n
    _store(metadata + bucket, scale, exists, meta_form)
    if rule == _MIN_MAX:
        _store(metadata + n + bucket, lo, exists, meta_form)

    high = tops[:, None]
    low = -high if signed else high * 0.0
    lowest = low.to(tl.int32)
    index = (bucket * size).to(tl.uint32)[:, None] + lane.to(tl.uint32)
    codes = ()
    for s in tl.static_range(_SLICES):
        u = xs[s]
        if rule == _MIN_MAX:
            u = u - lo[:, None]
        # The ends are integers, so that clamping first gives the same codes as clamping last.
        u = tl.minimum(tl.maximum(u * inverse[:, None], low), high)
        shifted = u + _MAGIC
        code = _bits(shifted) - _MAGIC_BITS - lowest
        if stochastic:
            nearest = shifted - _MAGIC
            above = nearest > u
            floor = tl.where(above, nearest - 1.0, nearest)
            noise = _noise(index + s * slice_size, k0.to(tl.uint32), k1.to(tl.uint32))
            code = code - above.to(tl.int32) + (noise < u - floor).to(tl.int32)
        codes = codes + (code,)

    pointer = payload + start[:, None] + lane
    store = exists[:, None] & (lane < slice_size)
    if mix_width == 0:
        _pack(codes, pointer, broken[:, None], store, width, slice_size)
    else:
        other = is_mixed[:, None]
        _pack(codes, pointer, broken[:, None], store & (other == 0), width, slice_size)
        _pack(codes, pointer, broken[:, None], store & other, mix_width, slice_size)


@triton.jit
def _decode_slices(
        out: tl.tensor, lines: tl.tuple, mix_lines: tl.tuple, lowest: tl.tensor, scale: tl.tensor,
        lo: tl.tensor, inside: tl.tensor, lane: tl.tensor, limit: tl.tensor, far: tl.tensor,
        kind: tl.tensor, scales: tl.tensor, shifts: tl.tensor, inner: tl.tensor, kinds: tl.tensor,
        largest: tl.constexpr, width: tl.constexpr, mix_width: tl.constexpr, form: tl.constexpr,
        slice_size: tl.constexpr, units: tl.constexpr, padded: tl.constexpr,
        tail: tl.constexpr) -> None:
    if units == _ONE:
        unit, shift = _unit(kind, scales, shifts)
    for s in tl.static_range(_SLICES):
        code = _unpack(lines, s, width)
        if mix_width > 0:
            # The lines of the other width are zero.
            code = code | _unpack(mix_lines, s, mix_width)
        y = (code + lowest).to(tl.float32) * scale + lo
        if units == _SEVERAL:
            if s > 0:
                far, kind = _next_units(far, kind, inner, kinds, slice_size)
            unit, shift = _unit(kind, scales, shifts)
        if units > 0:
            y = tl.clamp(y, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL) * unit
            if shifts is not None:
                y = y + shift
        y = tl.clamp(y, -largest, largest, propagate_nan=tl.PropagateNan.ALL)
        offset = inside + s * slice_size
        if tail:
            _store(out + offset, y, (offset < limit) & (lane < slice_size), form)
        elif padded:
            _store(out + offset, y, (lane < slice_size) & (offset >= 0), form)
        else:
            _store(out + offset, y, None, form)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["scales", "shifts"])
def decode_kernel(
        out: tl.tensor, payload: tl.tensor, metadata: tl.tensor, numel: tl.int64,
        n: tl.int64, mixed: tl.int64, multiplier: tl.int64, shift: tl.int64, row: tl.int64,
        scales: tl.tensor, shifts: tl.tensor, inner: tl.int64, kinds: tl.int64, size: tl.constexpr,
        buckets: tl.constexpr, lanes: tl.constexpr, width: tl.constexpr, mix_width: tl.constexpr,
        lowest: tl.constexpr, mix_lowest: tl.constexpr, affine: tl.constexpr, largest: tl.constexpr,
        rows: tl.constexpr, units: tl.constexpr, form: tl.constexpr, meta_form: tl.constexpr) -> None:
    """Decodes ``buckets`` buckets; ``mix_width`` is 0 where all have one width."""
    slice_size: tl.constexpr = size // 8
    padded: tl.constexpr = slice_size != lanes
    numel, n, mixed = numel.to(tl.int64), n.to(tl.int64), mixed.to(tl.int64)
    row, inner, kinds = row.to(tl.int64), inner.to(tl.int64), kinds.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * buckets
    number = tl.arange(0, buckets)
    lane = tl.arange(0, lanes)[None, :]
    bucket = first + number
    is_mixed, start = _locate(
        bucket, n, mixed, multiplier.to(tl.int64), shift.to(tl.int64), size, width, mix_width)
    exists = bucket < n
    scale = _load(metadata + bucket, exists, 0.0, meta_form)[:, None]
    if affine:
        lo = _load(metadata + n + bucket, exists, 0.0, meta_form)[:, None]
    else:
        lo = 0.0
    pointer = payload + start[:, None] + lane
    mask = exists[:, None] & (lane < slice_size)
    if mix_width == 0:
        lines = _load_planes(pointer, mask, width, slice_size)
        mix_lines = ()
    else:
        other = is_mixed[:, None]
        lines = _load_planes(pointer, mask & (other == 0), width, slice_size)
        mix_lines = _load_planes(pointer, mask & other, mix_width, slice_size)
    low = tl.where(is_mixed, mix_lowest, lowest)[:, None]
    place, distance, end = _place(first, number, n, row, size, buckets, rows)
    here, inside = out + place, distance + lane
    far, kind = _first_units(
        place, inside if units == _SEVERAL else distance, inner, kinds, units)
    whole = place + buckets * size <= numel
    if rows:
        whole = False
    if whole:
        _decode_slices(
            here, lines, mix_lines, low, scale, lo, inside, lane, 0, far, kind, scales,
            shifts, inner, kinds, largest, width, mix_width, form, slice_size, units, padded, False)
    else:
        limit = tl.where(exists[:, None], end, 0) if rows else (numel - place).to(tl.int32)
        _decode_slices(
            here, lines, mix_lines, low, scale, lo, inside, lane, limit, far, kind, scales,
            shifts, inner, kinds, largest, width, mix_width, form, slice_size, units, padded, True)
