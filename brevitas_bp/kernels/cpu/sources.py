"""The numba source of the bucket kernels: see :mod:`brevitas_bp.kernels.cpu.launch` for what calls them.

One source for float32 and float64: numba compiles it for the dtype of its arrays, and constants are
made of that dtype (``x.dtype.type``). A float ``x`` comes with ``bits``, the same memory as integers.

They give the bytes of :mod:`brevitas_bp.format.reference`: the same order of operations, no fused
multiply-add (no ``fastmath``), minima and maxima taken on the sortable integer form of a float, where
NaN is extreme, and every integer of the noise cast to 32 bits explicitly (numba promotes to 64).
"""

import math
from typing import Any

import numpy as np
import torch

from brevitas_bp.format.arithmetic import RANGE_LIMIT
from brevitas_bp.format.random import (
    HASH_LAST_SHIFT,
    HASH_ROUNDS,
    NOISE_BITS,
    ROUNDING,
    SPLITMIX,
)
from brevitas_bp.kernels.cpu.compiling import inline, jit, prefetch, wide_vectors, window
from brevitas_bp.kernels.cpu.derivatives import differentiate

_U = np.uint32
_L = np.uint64
_GOLDEN, _MIX1, _MIX2 = (np.uint64(constant) for constant in SPLITMIX)
_F = np.float32
_BF16_MIN = float(torch.finfo(torch.bfloat16).min)
_S0, _M0 = _U(HASH_ROUNDS[0][0]), _U(HASH_ROUNDS[0][1])
_S1, _M1 = _U(HASH_ROUNDS[1][0]), _U(HASH_ROUNDS[1][1])
_S2, _M2 = _U(HASH_ROUNDS[2][0]), _U(HASH_ROUNDS[2][1])
_S3 = _U(HASH_LAST_SHIFT)
_TO_NOISE = _U(32 - NOISE_BITS)
_STEP = _F(2.0**-NOISE_BITS)
_B1, _B2, _B4 = np.uint8(1), np.uint8(3), np.uint8(15)
_B2S, _B4S, _B6S = np.uint8(2), np.uint8(4), np.uint8(6)

# Elements of a group of buckets: half of a first cache.
_GROUP = 1 << 12
#: In place of the number of a derivative: the input is normalized.
NORMALIZED = -1


@jit
def _splitmix64(value: Any) -> Any:
    """See ``random.splitmix64``."""
    z = np.uint64(value + _GOLDEN)
    z = np.uint64(np.uint64(z ^ np.uint64(z >> _L(30))) * _MIX1)
    z = np.uint64(np.uint64(z ^ np.uint64(z >> _L(27))) * _MIX2)
    return np.uint64(z ^ np.uint64(z >> _L(31)))


@jit
def noise_keys(seed: Any) -> Any:
    """See ``random.noise_keys``; ``seed`` is its lower 64 bits."""
    key = _splitmix64(_splitmix64(np.uint64(_splitmix64(seed) ^ _L(ROUNDING))))
    return _U(key & _L(0xFFFFFFFF)), _U(key >> _L(32))


@jit
def reciprocal(scale: Any, dtype: Any) -> Any:
    """See ``arithmetic.reciprocal``."""
    return dtype.type(1) / scale if scale >= dtype.type(np.finfo(dtype).tiny) else dtype.type(0)


@jit
def extremes(bits: Any) -> Any:
    """Smallest and largest element, in the integer form that sorts like the floats."""
    wide_vectors()
    integer, info = bits.dtype.type, np.iinfo(bits.dtype)
    sign, magnitude = integer(info.bits - 1), integer(info.max)
    lowest, highest = integer(info.max), integer(info.min)
    for i in range(bits.size):
        key = integer(bits[i] ^ ((bits[i] >> sign) & magnitude))
        lowest = min(lowest, key)
        highest = max(highest, key)
    return lowest, highest


@jit
def largest_magnitude(bits: Any) -> Any:
    """The largest magnitude, as the bits of the float."""
    wide_vectors()
    magnitude = bits.dtype.type(np.iinfo(bits.dtype).max)
    peak = bits.dtype.type(0)
    for i in range(bits.size):
        peak = max(peak, bits.dtype.type(bits[i] & magnitude))
    return peak


@jit
def tree_sum(terms: Any) -> Any:
    """Sum of ``terms``, which are destroyed: the binary tree of ``arithmetic.l2_norm``."""
    n = terms.size
    while n > 1:
        half = (n + 1) // 2
        for i in range(n - half):
            terms[i] += terms[half + i]
        n = half
    return terms[0]


@jit
def squares(x: Any, unit: Any, out: Any) -> None:
    """Squares in float64; float64 data is divided by ``unit`` first."""
    wide_vectors()
    if np.finfo(x.dtype).bits == 64:
        for i in range(x.size):
            out[i] = (x[i] / unit) * (x[i] / unit)
    else:
        for i in range(x.size):
            out[i] = np.float64(x[i]) * np.float64(x[i])


@jit
def norm_unit(peak: Any, dtype: Any) -> Any:
    """What the elements of a norm are divided by."""
    return np.float64(peak) if np.finfo(dtype).bits == 64 and peak > 0 else 1.0


@jit
def _norm(x: Any, peak: Any, scratch: Any) -> Any:
    """See ``arithmetic.l2_norm``."""
    unit = norm_unit(peak, x.dtype)
    squares(x, unit, scratch)
    return x.dtype.type(math.sqrt(tree_sum(scratch)) * unit)


@jit
def _round_down_bf16(words: Any, sign: Any) -> None:
    """Floats as integers, each towards -inf (``sign`` 0) or +inf, see ``arithmetic.round_down``."""
    wide_vectors()
    integer = words.dtype.type
    flip = integer(np.iinfo(words.dtype).min if sign else 0)
    for i in range(words.size):
        word = integer(words[i] ^ flip)
        truncated = integer(word & integer(-65536))
        further = word < integer(0) and truncated != word
        words[i] = integer(truncated + integer(65536 if further else 0)) ^ flip


@jit
def affine_metadata(lowest: Any, highest: Any, tops: Any, bf16: Any, integer: Any) -> None:
    """Offsets and scales of buckets with these extremes, in place; NaN where they hold NaN or Inf.

    Args:
        lowest: of each bucket, as :func:`extremes` has them; floats of the same memory afterwards.
        highest: as ``lowest``; the scales afterwards.
        tops: largest code of each bucket, as floats.
        bf16: whether metadata are bfloat16.
        integer: whether the offset is a multiple of the scale.
    """
    wide_vectors()
    word, number = lowest.dtype.type, tops.dtype.type
    info = np.iinfo(lowest.dtype)
    sign, magnitude = word(info.bits - 1), word(info.max)
    mantissa = 23 if info.bits == 32 else 52
    infinite = word(info.max - ((1 << mantissa) - 1))
    # Of no lower bits, which rounding to bfloat16 would carry.
    nan = word(infinite | word(1 << (mantissa - 1)))
    offsets, scales = lowest.view(tops.dtype), highest.view(tops.dtype)
    for i in range(tops.size):
        finite = lowest[i] > word(~infinite) and highest[i] < infinite
        lo = word(lowest[i] ^ word((lowest[i] >> sign) & magnitude))
        hi = word(highest[i] ^ word((highest[i] >> sign) & magnitude))
        lowest[i] = lo if finite else nan
        highest[i] = hi if finite else nan
    for i in range(tops.size):
        offsets[i] += number(0)
        scales[i] += number(0)
    if bf16:
        _round_down_bf16(lowest, 0)
        least = number(_BF16_MIN)
        for i in range(tops.size):
            offsets[i] = least if offsets[i] < least else offsets[i]
    for i in range(tops.size):
        scales[i] -= offsets[i]
    finish_scales(scales, tops, bf16)
    if integer:
        for i in range(tops.size):
            inverse = reciprocal(scales[i], tops.dtype)
            if inverse > number(0):
                offsets[i] = -number(np.rint(-offsets[i] * inverse)) * scales[i] + number(0)


@jit
def finish_scales(ranges: Any, tops: Any, bf16: Any) -> None:
    """Scales of buckets with these ranges (NaN for none), in place."""
    wide_vectors()
    number = ranges.dtype.type
    limit = number(np.finfo(ranges.dtype).max * RANGE_LIMIT)
    for i in range(ranges.size):
        ranges[i] = (limit if ranges[i] > limit else ranges[i]) / tops[i]
    if bf16:
        _round_down_bf16(ranges.view(np.int32), 1)
        largest = number(-_BF16_MIN)
        for i in range(ranges.size):
            ranges[i] = largest if ranges[i] > largest else ranges[i]


@jit
def round_stochastic(
        x: Any, codes: Any, lo: Any, inverse: Any, lowest: Any, top: Any, index: Any, k0: Any,
        k1: Any) -> None:
    """Codes of ``x``, whose first element has the flat index ``index``, counted from ``lowest``."""
    wide_vectors()
    number = x.dtype.type
    low, high = number(lowest), number(top)
    for i in range(x.size):
        u = (x[i] - lo) * inverse
        h = _U(_U(index + _U(i)) + k0)
        h = _U(_U(h ^ _U(h >> _S0)) * _M0)
        h = _U(h ^ k1)
        h = _U(_U(h ^ _U(h >> _S1)) * _M1)
        h = _U(_U(h ^ _U(h >> _S2)) * _M2)
        h = _U(h ^ _U(h >> _S3))
        noise = _F(np.int32(h >> _TO_NOISE)) * _STEP
        floor = np.floor(u)
        q = floor + (number(1) if noise < u - floor else number(0))
        q = low if q < low else q
        q = high if q > high else q
        # Of floats: numba would subtract integers of 64 bits.
        codes[i] = np.uint8(np.int32(q - low))


@jit
def round_nearest(x: Any, codes: Any, lo: Any, inverse: Any, lowest: Any, top: Any) -> None:
    """As :func:`round_stochastic`, to nearest."""
    wide_vectors()
    number = x.dtype.type
    low, high = number(lowest), number(top)
    for i in range(x.size):
        q = np.rint((x[i] - lo) * inverse)
        q = low if q < low else q
        q = high if q > high else q
        # Of floats: numba would subtract integers of 64 bits.
        codes[i] = np.uint8(np.int32(q - low))


@jit
def copy_bytes(source: Any, target: Any) -> None:
    """Copies all of ``source``: an assignment of slices is not turned into vector code."""
    wide_vectors()
    for i in range(source.size):
        target[i] = source[i]


# Each plane is written out: one loop over its bytes, which the compiler turns into vector code.


@jit
def pack(codes: Any, width: Any, out: Any) -> None:
    """See ``packing.pack``, of one bucket."""
    wide_vectors()
    size = codes.size
    if width == 8:
        copy_bytes(codes, out)
        return
    start, first = 0, np.uint8(0)
    if width & 4:
        n = size // 2
        plane, a, b = window(out, start, n), window(codes, 0, n), window(codes, n, n)
        for j in range(n):
            plane[j] = np.uint8(a[j] & _B4) | np.uint8(np.uint8(b[j] & _B4) << _B4S)
        start, first = start + n, np.uint8(4)
    if width & 2:
        n = size // 4
        plane, a, b = window(out, start, n), window(codes, 0, n), window(codes, n, n)
        c, d = window(codes, 2 * n, n), window(codes, 3 * n, n)
        for j in range(n):
            low = np.uint8(
                np.uint8(np.uint8(a[j] >> first) & _B2) |
                np.uint8(np.uint8(np.uint8(b[j] >> first) & _B2) << _B2S))
            high = np.uint8(
                np.uint8(np.uint8(c[j] >> first) & _B2) |
                np.uint8(np.uint8(np.uint8(d[j] >> first) & _B2) << _B2S))
            plane[j] = np.uint8(low | np.uint8(high << _B4S))
        start, first = start + n, np.uint8(first + np.uint8(2))
    if width & 1:
        n = size // 8
        plane = window(out, start, n)
        plane[:] = 0
        for i in range(8):
            part = window(codes, i * n, n)
            shift = np.uint8(i)
            for j in range(n):
                bit = np.uint8(np.uint8(part[j] >> first) & _B1)
                plane[j] = np.uint8(plane[j] | np.uint8(bit << shift))


@jit
def unpack(packed: Any, width: Any, codes: Any) -> None:
    """See ``packing.unpack``, of one bucket."""
    wide_vectors()
    size = codes.size
    if width == 8:
        copy_bytes(packed, codes)
        return
    start, first = 0, np.uint8(0)
    if width & 4:
        n = size // 2
        plane, a, b = window(packed, start, n), window(codes, 0, n), window(codes, n, n)
        for j in range(n):
            a[j] = np.uint8(plane[j] & _B4)
            b[j] = np.uint8(plane[j] >> _B4S)
        start, first = start + n, np.uint8(4)
    else:
        codes[:] = 0
    if width & 2:
        n = size // 4
        plane, a, b = window(packed, start, n), window(codes, 0, n), window(codes, n, n)
        c, d = window(codes, 2 * n, n), window(codes, 3 * n, n)
        for j in range(n):
            v = plane[j]
            a[j] |= np.uint8(np.uint8(v & _B2) << first)
            b[j] |= np.uint8(np.uint8(np.uint8(v >> _B2S) & _B2) << first)
            c[j] |= np.uint8(np.uint8(np.uint8(v >> _B4S) & _B2) << first)
            d[j] |= np.uint8(np.uint8(v >> _B6S) << first)
        start, first = start + n, np.uint8(first + np.uint8(2))
    if width & 1:
        n = size // 8
        plane = window(packed, start, n)
        for i in range(8):
            part = window(codes, i * n, n)
            shift = np.uint8(i)
            for j in range(n):
                bit = np.uint8(np.uint8(plane[j] >> shift) & _B1)
                part[j] = np.uint8(part[j] | np.uint8(bit << first))


@jit
def locate(
        bucket: Any, size: Any, n: Any, mixed: Any, multiplier: Any, shift: Any, widths: Any) -> Any:
    """Which width a bucket has (1: the mixed one) and where its bytes begin."""
    # Of one width: no division.
    slot = bucket if multiplier == 1 and shift == 0 else (multiplier * bucket + shift) % n
    if slot < mixed:
        return 1, slot * (size * widths[1] // 8)
    return 0, mixed * (size * widths[1] // 8) + (slot - mixed) * (size * widths[0] // 8)


# Metadata are stored as 16-bit words, lowest first: one word (the upper half of a float32) where they
# are bfloat16, else two or four. So one compiled function serves both metadata dtypes.


@jit
def store(words: Any, begin: Any, values: Any, bf16: Any) -> None:
    """Writes ``values`` from place ``begin`` on."""
    for i in range(values.size):
        # NaN has one bit pattern, whichever operation made it.
        if np.isnan(values[i]):
            values[i] = np.nan
    parts = values.view(np.uint16)
    if bf16:
        for i in range(values.size):
            words[begin + i] = parts[2 * i + 1]
    else:
        per_value = np.finfo(values.dtype).bits // 16
        for i in range(parts.size):
            words[begin * per_value + i] = parts[i]


@jit
def load(words: Any, begin: Any, bf16: Any, values: Any) -> None:
    """Reads what :func:`store` wrote."""
    parts = values.view(np.uint16)
    if bf16:
        for i in range(values.size):
            parts[2 * i] = 0
            parts[2 * i + 1] = words[begin + i]
    else:
        per_value = np.finfo(values.dtype).bits // 16
        copy_bytes(window(words, begin * per_value, parts.size), parts)


@jit
def _ranges(
        values: Any, words: Any, i: Any, rule: Any, first: Any, second: Any, norms: Any,
        scratch: Any) -> None:
    """What the scale of a bucket is made of: extremes, or a norm (NaN if the bucket has none)."""
    if rule == 0:
        first[i], second[i] = extremes(words)
        return
    number = values.dtype.type
    second[i] = largest_magnitude(words)
    peak = norms[i]
    if not np.isfinite(peak):
        norms[i] = number(np.nan)
    elif rule == 2:
        norms[i] = _norm(values, peak, scratch)


@jit
def place(bucket: Any, first: Any, size: Any, row: Any, per_row: Any) -> Any:
    """Where a bucket begins in a tensor that starts with bucket ``first``, and its elements at most.

    Rows of ``row`` elements have ``per_row`` buckets each. ``row`` is 0 where there are no rows.
    """
    if row == 0:
        return (bucket - first) * size, size
    of_row = bucket // per_row
    inside = (bucket - of_row * per_row) * size
    return (of_row - first // per_row) * row + inside, min(size, row - inside)


@jit
def multiplier_of(scales: Any, kind: Any, largest: Any, divides: Any) -> Any:
    """What values of a statistic are multiplied by; see ``normalizing.Affine``."""
    scale, number = scales[kind], scales.dtype.type
    if scale >= largest:
        return number(0)
    return number(1) / scale if divides else scale


@jit
def normalize(
        x: Any, index: Any, shifts: Any, scales: Any, inner: Any, largest: Any, divides: Any,
        out: Any) -> None:
    """See ``normalizing.normalize``; ``x`` begins with element ``index`` of the tensor.

    ``shifts`` is empty where there are none.
    """
    wide_vectors()
    done, kinds = 0, scales.size
    run = index // inner
    kind, left = run % kinds, (run + 1) * inner - index
    while done < x.size:
        if inner == 1:
            count = min(kinds - kind, x.size - done)
            u, v = window(x, done, count), window(out, done, count)
            copy_bytes(u, v)
            if shifts.size:
                a = window(shifts, kind, count)
                for i in range(count):
                    v[i] -= a[i]
            b = window(scales, kind, count)
            for i in range(count):
                v[i] *= multiplier_of(b, i, largest, divides)
            kind = 0
        else:
            count = min(left, x.size - done)
            u, v = window(x, done, count), window(out, done, count)
            scale = multiplier_of(scales, kind, largest, divides)
            if shifts.size:
                shift = shifts[kind]
                for i in range(count):
                    v[i] = (u[i] - shift) * scale
            else:
                for i in range(count):
                    v[i] = u[i] * scale
            kind, left = kind + 1, inner
            kind = 0 if kind == kinds else kind
        done += count


@inline
def bounded(x: Any, limit: Any) -> Any:
    """``x`` between ``-limit`` and ``limit``; NaN stays."""
    x = limit if x > limit else x
    return -limit if x < -limit else x


@jit
def denormalize(
        y: Any, index: Any, shifts: Any, scales: Any, inner: Any, largest: Any, divides: Any,
        limit: Any) -> None:
    """See ``normalizing.denormalize``; in place. ``shifts`` is empty where there are none."""
    wide_vectors()
    done, kinds = 0, scales.size
    run = index // inner
    kind, left = run % kinds, (run + 1) * inner - index
    while done < y.size:
        if inner == 1:
            count = min(kinds - kind, y.size - done)
            v, b = window(y, done, count), window(scales, kind, count)
            if shifts.size:
                a = window(shifts, kind, count)
                for i in range(count):
                    v[i] = bounded(v[i] * multiplier_of(b, i, largest, divides) + a[i], limit)
            else:
                for i in range(count):
                    v[i] = bounded(v[i] * multiplier_of(b, i, largest, divides), limit)
            kind = 0
        else:
            count = min(left, y.size - done)
            v, scale = window(y, done, count), multiplier_of(scales, kind, largest, divides)
            if shifts.size:
                shift = shifts[kind]
                for i in range(count):
                    v[i] = bounded(v[i] * scale + shift, limit)
            else:
                for i in range(count):
                    v[i] = bounded(v[i] * scale, limit)
            kind, left = kind + 1, inner
            kind = 0 if kind == kinds else kind
        done += count


@jit
def encode(
        x: Any, bits: Any, first: Any, begin: Any, end: Any, size: Any, n: Any, mixed: Any,
        multiplier: Any, shift: Any, widths: Any, tops: Any, lowests: Any, rule: Any, bf16: Any,
        integer: Any, stochastic: Any, k0: Any, k1: Any, payload: Any, metadata: Any,
        function: Any, row: Any, per_row: Any, index: Any, shifts: Any, scales_of: Any,
        inner: Any, largest: Any, divides: Any) -> None:
    """Buckets ``begin .. end - 1``; ``x`` starts with bucket ``first``, at element ``index``.

    Where ``function`` is not 0, its derivative at ``x`` is encoded, or with :data:`NORMALIZED` what
    :func:`normalize` makes of ``x``. Rows are those of :func:`place`.

    ``metadata`` holds the scales, then for affine codes the offsets, as :func:`store` writes them.

    Buckets are taken in groups that stay in cache: ranges of all of them, then their scales in vector
    code, then their codes, then their bytes.
    """
    number = x.dtype.type
    group, line = max(1, _GROUP // size), 512 // np.finfo(x.dtype).bits
    buffer = np.empty(group * size, np.uint8)
    scratch = np.empty(size if rule == 2 else 1, np.float64)
    # Of what is computed or padded. Without rows only the last bucket of all is padded.
    apart = function != 0 or row != 0
    copy_bits = np.empty(group * size if apart else size, bits.dtype)
    copies = copy_bits.view(x.dtype)
    lows, highs = np.empty(group, bits.dtype), np.empty(group, bits.dtype)
    norms, all_tops = highs.view(x.dtype), np.empty(group, x.dtype)
    while begin < end:
        count = min(group, end - begin)
        low, high, top = window(lows, 0, count), window(highs, 0, count), window(all_tops, 0, count)
        for i in range(count):
            kind, _ = locate(begin + i, size, n, mixed, multiplier, shift, widths)
            top[i] = number(tops[kind])
            start, most = place(begin + i, first, size, row, per_row)
            valid = min(most, x.size - start)
            if function != 0 or valid < size:
                slot = i * size if apart else 0
                values, words = window(copies, slot, size), window(copy_bits, slot, size)
                source, target = window(x, start, valid), window(copies, slot, valid)
                if function == NORMALIZED:
                    normalize(
                        source, index + start, shifts, scales_of, inner, largest, divides, target)
                elif function != 0:
                    differentiate(function, source, target)
                else:
                    copy_bytes(source, target)
                fill = number(0) if rule == 2 else values[valid - 1]
                for j in range(valid, size):
                    values[j] = fill
            else:
                values, words = window(x, start, size), window(bits, start, size)
            _ranges(values, words, i, rule, low, high, norms, scratch)
        scales, offsets = high.view(x.dtype), low.view(x.dtype)
        if rule == 0:
            affine_metadata(low, high, top, bf16, integer)
        else:
            finish_scales(scales, top, bf16)
            offsets[:] = number(0)
        for i in range(count):
            bucket = begin + i
            start, most = place(bucket, first, size, row, per_row)
            kind, _ = locate(bucket, size, n, mixed, multiplier, shift, widths)
            scale, lo, codes = scales[i], offsets[i], window(buffer, i * size, size)
            if function != 0 or min(most, x.size - start) < size:
                values = window(copies, i * size if apart else 0, size)
            else:
                values = window(x, start, size)
            # Of the next group: memory is read while this one is rounded.
            ahead = start + group * size
            for j in range(ahead, min(ahead + size, x.size), line):
                prefetch(x, j)
            inverse = reciprocal(scale, x.dtype)
            if np.isnan(scale):
                codes[:] = 0
            elif stochastic:
                round_stochastic(
                    values, codes, lo, inverse, lowests[kind], tops[kind],
                    _U((bucket * size) & 0xFFFFFFFF), k0, k1)
            else:
                round_nearest(values, codes, lo, inverse, lowests[kind], tops[kind])
        # Not right after rounding, whose last codes are on their way to the cache.
        for i in range(count):
            kind, position = locate(begin + i, size, n, mixed, multiplier, shift, widths)
            width = widths[kind]
            pack(window(buffer, i * size, size), width, window(payload, position, size * width // 8))
        store(metadata, begin, scales, bf16)
        if rule == 0:
            store(metadata, n + begin, offsets, bf16)
        begin += count


@jit
def dequantize(codes: Any, lowest: Any, scale: Any, lo: Any, limit: Any, out: Any) -> None:
    """Values of codes that are counted from ``lowest``; ``out`` may be shorter."""
    wide_vectors()
    number = out.dtype.type
    low = number(lowest)
    for i in range(out.size):
        y = (number(np.int32(codes[i])) + low) * scale + lo
        y = limit if y > limit else y
        out[i] = -limit if y < -limit else y


@jit
def decode(
        out: Any, first: Any, begin: Any, end: Any, size: Any, n: Any, mixed: Any, multiplier: Any,
        shift: Any, widths: Any, lowests: Any, bf16: Any, payload: Any, scales: Any, offsets: Any,
        limit: Any, row: Any, per_row: Any, index: Any, shifts: Any, scales_of: Any,
        inner: Any, largest: Any, divides: Any) -> None:
    """Buckets ``begin .. end - 1`` into ``out``, which starts with bucket ``first``.

    The last eight are those of :func:`encode`; ``scales_of`` is empty where nothing is normalized.
    """
    number = out.dtype.type
    codes = np.empty(size, np.uint8)
    scale, lo = np.empty(end - begin, out.dtype), np.empty(end - begin, out.dtype)
    load(scales, begin, bf16, scale)
    if offsets.size:
        load(offsets, begin, bf16, lo)
    else:
        lo[:] = number(0)
    bound = number(np.finfo(out.dtype).max) if scales_of.size else limit
    for bucket in range(begin, end):
        kind, position = locate(bucket, size, n, mixed, multiplier, shift, widths)
        width = widths[kind]
        unpack(window(payload, position, size * width // 8), width, codes)
        start, most = place(bucket, first, size, row, per_row)
        values = window(out, start, min(most, out.size - start))
        dequantize(
            codes, lowests[kind], scale[bucket - begin], lo[bucket - begin], bound, values)
        if scales_of.size:
            denormalize(
                values, index + start, shifts, scales_of, inner, largest, divides, limit)
