"""The numba source of the bucket kernels: see :mod:`brevitas_bp.kernels.cpu` for what calls them.

One source for float32 and float64: numba compiles it for the dtype of its arrays, and constants are
made of that dtype (``x.dtype.type``). A float ``x`` comes with ``bits``, the same memory as integers.

They give the bytes of :mod:`brevitas_bp.kernels.reference`: the same order of operations, no fused
multiply-add (no ``fastmath``), minima and maxima taken on the sortable integer form of a float, where
NaN is extreme, and every integer of the noise cast to 32 bits explicitly (numba promotes to 64).
"""

import math
from typing import Any

import numba
import numpy as np
import torch

from brevitas_bp.kernels.arithmetic import RANGE_LIMIT
from brevitas_bp.kernels.random import HASH_LAST_SHIFT, HASH_ROUNDS, NOISE_BITS

_U = np.uint32
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

jit = numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)


@jit
def _round_down_bf16(value: Any, one: Any, view: Any) -> Any:
    """See ``arithmetic.round_down``; ``one`` and ``view`` are the same four bytes."""
    integer = one.dtype.type
    view[0] = value
    truncated = integer(one[0] & integer(-65536))
    if one[0] < 0 and truncated != one[0]:
        truncated = integer(truncated + integer(65536))
    one[0] = truncated
    return max(view[0], view.dtype.type(_BF16_MIN))


@jit
def reciprocal(scale: Any, dtype: Any) -> Any:
    """See ``arithmetic.reciprocal``."""
    return dtype.type(1) / scale if scale >= dtype.type(np.finfo(dtype).tiny) else dtype.type(0)


@jit
def extremes(bits: Any) -> Any:
    """Smallest and largest element, in the integer form that sorts like the floats."""
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
def affine_metadata(
        lowest: Any, highest: Any, top: Any, bf16: Any, integer: Any, one: Any, view: Any) -> Any:
    """Scale and offset of a bucket with these extremes; NaN where it holds NaN or Inf.

    ``one`` and ``view`` are the same four or eight bytes.
    """
    number, word = view.dtype.type, one.dtype.type
    info = np.iinfo(one.dtype)
    sign, magnitude = word(info.bits - 1), word(info.max)
    view[0] = np.inf
    infinite = one[0]
    if lowest <= word(~infinite) or highest >= infinite:
        return number(np.nan), number(np.nan)
    one[0] = word(lowest ^ ((lowest >> sign) & magnitude))
    lo = view[0] + number(0)
    one[0] = word(highest ^ ((highest >> sign) & magnitude))
    hi = view[0] + number(0)
    if bf16:
        lo = _round_down_bf16(lo, one, view)
    limit = number(np.finfo(view.dtype).max * RANGE_LIMIT)
    scale = min(hi - lo, limit) / number(top)
    if bf16:
        scale = -_round_down_bf16(-scale, one, view)
    inverse = reciprocal(scale, view.dtype)
    if integer and inverse > number(0):
        lo = -number(np.rint(-lo * inverse)) * scale + number(0)
    return scale, lo


@jit
def symmetric_metadata(norm: Any, top: Any, bf16: Any, one: Any, view: Any) -> Any:
    """Scale of a bucket whose norm is finite, or overflowed."""
    number = view.dtype.type
    scale = min(norm, number(np.finfo(view.dtype).max * RANGE_LIMIT)) / number(top)
    return -_round_down_bf16(-scale, one, view) if bf16 else scale


@jit
def _metadata(
        x: Any, bits: Any, rule: Any, top: Any, bf16: Any, integer: Any, one: Any, view: Any,
        scratch: Any) -> Any:
    """Scale and offset of one bucket; NaN where it holds NaN or Inf."""
    number = x.dtype.type
    if rule == 0:
        lowest, highest = extremes(bits)
        return affine_metadata(lowest, highest, top, bf16, integer, one, view)
    one[0] = largest_magnitude(bits)
    peak = view[0]
    if not np.isfinite(peak):
        return number(np.nan), number(0)
    norm = peak if rule == 1 else _norm(x, peak, scratch)
    return symmetric_metadata(norm, top, bf16, one, view), number(0)


@jit
def round_stochastic(
        x: Any, codes: Any, lo: Any, inverse: Any, lowest: Any, top: Any, index: Any, k0: Any,
        k1: Any) -> None:
    """Codes of ``x``, whose first element has the flat index ``index``, counted from ``lowest``."""
    number = x.dtype.type
    shift = np.int32(lowest)
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
        codes[i] = np.uint8(np.int32(q) - shift)


@jit
def round_nearest(x: Any, codes: Any, lo: Any, inverse: Any, lowest: Any, top: Any) -> None:
    """As :func:`round_stochastic`, to nearest."""
    number = x.dtype.type
    shift = np.int32(lowest)
    low, high = number(lowest), number(top)
    for i in range(x.size):
        q = np.rint((x[i] - lo) * inverse)
        q = low if q < low else q
        q = high if q > high else q
        codes[i] = np.uint8(np.int32(q) - shift)


@jit
def copy_bytes(source: Any, target: Any) -> None:
    """Copies all of ``source``: an assignment of slices is not turned into vector code."""
    for i in range(source.size):
        target[i] = source[i]


# Each plane is written out: one loop over its bytes, which the compiler turns into vector code.


@jit
def pack(codes: Any, width: Any, out: Any) -> None:
    """See ``packing.pack``, of one bucket."""
    size = codes.size
    if width == 8:
        copy_bytes(codes, out)
        return
    start, first = 0, np.uint8(0)
    if width & 4:
        n = size // 2
        plane = out[start:start + n]
        for j in range(n):
            plane[j] = np.uint8(codes[j] & _B4) | np.uint8(np.uint8(codes[n + j] & _B4) << _B4S)
        start, first = start + n, np.uint8(4)
    if width & 2:
        n = size // 4
        plane = out[start:start + n]
        for j in range(n):
            a = np.uint8(np.uint8(codes[j] >> first) & _B2)
            b = np.uint8(np.uint8(codes[n + j] >> first) & _B2)
            c = np.uint8(np.uint8(codes[2 * n + j] >> first) & _B2)
            d = np.uint8(np.uint8(codes[3 * n + j] >> first) & _B2)
            low = np.uint8(a | np.uint8(b << _B2S))
            plane[j] = np.uint8(low | np.uint8(np.uint8(c | np.uint8(d << _B2S)) << _B4S))
        start, first = start + n, np.uint8(first + np.uint8(2))
    if width & 1:
        n = size // 8
        plane = out[start:start + n]
        plane[:] = 0
        for i in range(8):
            part = codes[i * n:(i + 1) * n]
            shift = np.uint8(i)
            for j in range(n):
                bit = np.uint8(np.uint8(part[j] >> first) & _B1)
                plane[j] = np.uint8(plane[j] | np.uint8(bit << shift))


@jit
def unpack(packed: Any, width: Any, codes: Any) -> None:
    """See ``packing.unpack``, of one bucket."""
    size = codes.size
    if width == 8:
        copy_bytes(packed, codes)
        return
    start, first = 0, np.uint8(0)
    if width & 4:
        n = size // 2
        plane = packed[start:start + n]
        for j in range(n):
            codes[j] = np.uint8(plane[j] & _B4)
            codes[n + j] = np.uint8(plane[j] >> _B4S)
        start, first = start + n, np.uint8(4)
    else:
        codes[:] = 0
    if width & 2:
        n = size // 4
        plane = packed[start:start + n]
        for j in range(n):
            v = plane[j]
            codes[j] |= np.uint8(np.uint8(v & _B2) << first)
            codes[n + j] |= np.uint8(np.uint8(np.uint8(v >> _B2S) & _B2) << first)
            codes[2 * n + j] |= np.uint8(np.uint8(np.uint8(v >> _B4S) & _B2) << first)
            codes[3 * n + j] |= np.uint8(np.uint8(v >> _B6S) << first)
        start, first = start + n, np.uint8(first + np.uint8(2))
    if width & 1:
        n = size // 8
        plane = packed[start:start + n]
        for i in range(8):
            part = codes[i * n:(i + 1) * n]
            shift = np.uint8(i)
            for j in range(n):
                bit = np.uint8(np.uint8(plane[j] >> shift) & _B1)
                part[j] = np.uint8(part[j] | np.uint8(bit << first))


@jit
def locate(
        bucket: Any, size: Any, n: Any, mixed: Any, multiplier: Any, shift: Any, widths: Any) -> Any:
    """Which width a bucket has (1: the mixed one) and where its bytes begin."""
    slot = (multiplier * bucket + shift) % n
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
def load(words: Any, index: Any, bf16: Any, parts: Any, view: Any) -> Any:
    """Reads what :func:`store` wrote; ``parts`` and ``view`` are the same bytes."""
    # Written out: it runs for each bucket, and a loop of its own costs as much as the bucket.
    if np.finfo(view.dtype).bits == 64:
        parts[0] = words[4 * index]
        parts[1] = words[4 * index + 1]
        parts[2] = words[4 * index + 2]
        parts[3] = words[4 * index + 3]
    elif bf16:
        parts[0] = 0
        parts[1] = words[index]
    else:
        parts[0] = words[2 * index]
        parts[1] = words[2 * index + 1]
    return view[0]


@jit
def encode(
        x: Any, bits: Any, first: Any, begin: Any, end: Any, size: Any, n: Any, mixed: Any,
        multiplier: Any, shift: Any, widths: Any, tops: Any, lowests: Any, rule: Any, bf16: Any,
        integer: Any, stochastic: Any, k0: Any, k1: Any, payload: Any, metadata: Any) -> None:
    """Buckets ``begin .. end - 1``; ``x`` starts with bucket ``first``.

    ``metadata`` holds the scales, then for affine codes the offsets, as :func:`store` writes them.
    """
    codes = np.empty(size, np.uint8)
    padded_bits = np.empty(size, bits.dtype)
    padded = padded_bits.view(x.dtype)
    one = np.empty(1, bits.dtype)
    view = one.view(x.dtype)
    scratch = np.empty(size if rule == 2 else 1, np.float64)
    scales, offsets = np.empty(end - begin, x.dtype), np.empty(end - begin, x.dtype)
    for bucket in range(begin, end):
        kind, position = locate(bucket, size, n, mixed, multiplier, shift, widths)
        width = widths[kind]
        nbytes = size * width // 8
        start = (bucket - first) * size
        if start + size <= x.size:
            values, words = x[start:start + size], bits[start:start + size]
        else:
            valid = x.size - start
            padded[:valid] = x[start:]
            padded[valid:] = x.dtype.type(0) if rule == 2 else x[x.size - 1]
            values, words = padded, padded_bits
        scale, lo = _metadata(
            values, words, rule, tops[kind], bf16, integer, one, view, scratch)
        scales[bucket - begin] = scale
        offsets[bucket - begin] = lo
        if np.isnan(scale):
            codes[:] = 0
        elif stochastic:
            round_stochastic(
                values, codes, lo, reciprocal(scale, x.dtype), lowests[kind], tops[kind],
                _U((bucket * size) & 0xFFFFFFFF), k0, k1)
        else:
            round_nearest(
                values, codes, lo, reciprocal(scale, x.dtype), lowests[kind], tops[kind])
        pack(codes, width, payload[position:position + nbytes])
    # Not within the loop, which the compiler then makes worse.
    store(metadata, begin, scales, bf16)
    if rule == 0:
        store(metadata, n + begin, offsets, bf16)


@jit
def dequantize(codes: Any, lowest: Any, scale: Any, lo: Any, limit: Any, out: Any) -> None:
    """Values of codes that are counted from ``lowest``; ``out`` may be shorter."""
    number = out.dtype.type
    for i in range(out.size):
        y = number(np.int32(np.int32(codes[i]) + lowest)) * scale + lo
        y = limit if y > limit else y
        out[i] = -limit if y < -limit else y


@jit
def decode(
        out: Any, first: Any, begin: Any, end: Any, size: Any, n: Any, mixed: Any, multiplier: Any,
        shift: Any, widths: Any, lowests: Any, bf16: Any, payload: Any, scales: Any, offsets: Any,
        limit: Any) -> None:
    """Buckets ``begin .. end - 1`` into ``out``, which starts with bucket ``first``."""
    codes = np.empty(size, np.uint8)
    view = np.empty(1, out.dtype)
    parts = view.view(np.uint16)
    for bucket in range(begin, end):
        kind, position = locate(bucket, size, n, mixed, multiplier, shift, widths)
        width = widths[kind]
        nbytes = size * width // 8
        unpack(payload[position:position + nbytes], width, codes)
        scale = load(scales, bucket, bf16, parts, view)
        lo = load(offsets, bucket, bf16, parts, view) if offsets.size else out.dtype.type(0)
        start = (bucket - first) * size
        count = min(size, out.size - start)
        dequantize(codes, np.int32(lowests[kind]), scale, lo, limit, out[start:start + count])
