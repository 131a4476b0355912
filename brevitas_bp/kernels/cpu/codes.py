"""Rounds, packs and dequantizes one bucket, in numba: see :mod:`brevitas_bp.format`.

Integers of the noise are cast to 32 bits explicitly, because numba promotes to 64 bits.
"""

from typing import Any

import numpy as np

from brevitas_bp.format.random import (
    HASH_LAST_SHIFT,
    HASH_ROUNDS,
    NOISE_BITS,
    SPLITMIX,
)
from brevitas_bp.format.stages import COMPANDED, DITHERED, NEAREST, STOCHASTIC
from brevitas_bp.kernels.cpu.compiling import inline, jit, wide_vectors, window

#: The roundings that :func:`round_codes` implements.
ROUNDINGS = frozenset({NEAREST, STOCHASTIC, DITHERED, COMPANDED})
_STOCHASTIC, _DITHERED, _COMPANDED = STOCHASTIC.number, DITHERED.number, COMPANDED.number

_U = np.uint32
_L = np.uint64
_GOLDEN, _MIX1, _MIX2 = (np.uint64(constant) for constant in SPLITMIX)
_F = np.float32
_S0, _M0 = _U(HASH_ROUNDS[0][0]), _U(HASH_ROUNDS[0][1])
_S1, _M1 = _U(HASH_ROUNDS[1][0]), _U(HASH_ROUNDS[1][1])
_S2, _M2 = _U(HASH_ROUNDS[2][0]), _U(HASH_ROUNDS[2][1])
_S3 = _U(HASH_LAST_SHIFT)
_TO_NOISE = _U(32 - NOISE_BITS)
_STEP = _F(2.0**-NOISE_BITS)
_B1, _B2, _B4 = np.uint8(1), np.uint8(3), np.uint8(15)
_B2S, _B4S, _B6S = np.uint8(2), np.uint8(4), np.uint8(6)


@jit
def _splitmix64(value: Any) -> Any:
    """See ``random.splitmix64``."""
    z = np.uint64(value + _GOLDEN)
    z = np.uint64(np.uint64(z ^ np.uint64(z >> _L(30))) * _MIX1)
    z = np.uint64(np.uint64(z ^ np.uint64(z >> _L(27))) * _MIX2)
    return np.uint64(z ^ np.uint64(z >> _L(31)))


@jit
def noise_keys(seed: Any, stream: Any) -> Any:
    """See ``random.noise_keys``; ``seed`` is the lower 64 bits of the seed."""
    key = _splitmix64(_splitmix64(np.uint64(_splitmix64(seed) ^ _L(stream))))
    return _U(key & _L(0xFFFFFFFF)), _U(key >> _L(32))


@inline
def word_of(index: Any, k0: Any, k1: Any) -> Any:
    """See ``random.words_``; ``index`` is uint32, and so is the result."""
    h = _U(index + k0)
    h = _U(_U(h ^ _U(h >> _S0)) * _M0)
    h = _U(h ^ k1)
    h = _U(_U(h ^ _U(h >> _S1)) * _M1)
    h = _U(_U(h ^ _U(h >> _S2)) * _M2)
    return _U(h ^ _U(h >> _S3))


@inline
def noise_of(index: Any, k0: Any, k1: Any) -> Any:
    """See ``random.uniform_``; ``index`` is uint32."""
    return _F(np.int32(word_of(index, k0, k1) >> _TO_NOISE)) * _STEP


@jit
def round_stochastic(
        x: Any, codes: Any, lo: Any, inverse: Any, lowest: Any, top: Any, index: Any, k0: Any,
        k1: Any) -> None:
    """Writes the codes of ``x``, counted from ``lowest``; ``index`` is the flat index of ``x[0]``."""
    wide_vectors()
    number = x.dtype.type
    low, high = number(lowest), number(top)
    for i in range(x.size):
        u = (x[i] - lo) * inverse
        noise = noise_of(_U(index + _U(i)), k0, k1)
        floor = np.floor(u)
        q = floor + (number(1) if noise < u - floor else number(0))
        q = low if q < low else q
        q = high if q > high else q
        # Subtract floats: numba would subtract integers in 64 bits.
        codes[i] = np.uint8(np.int32(q - low))


@jit
def round_dithered(
        x: Any, codes: Any, lo: Any, inverse: Any, lowest: Any, top: Any, index: Any, k0: Any,
        k1: Any) -> None:
    """Works like :func:`round_stochastic`, with subtractive dither."""
    wide_vectors()
    number = x.dtype.type
    low, high = number(lowest), number(top)
    for i in range(x.size):
        u = (x[i] - lo) * inverse
        q = np.floor(u + number(noise_of(_U(index + _U(i)), k0, k1)))
        q = low if q < low else q
        q = high if q > high else q
        codes[i] = np.uint8(np.int32(q - low))


@jit
def round_companded(
        x: Any, codes: Any, lo: Any, inverse: Any, top: Any, index: Any, k0: Any, k1: Any) -> None:
    """Works like :func:`round_stochastic`, between the levels of ``stages.COMPANDED``."""
    wide_vectors()
    number = x.dtype.type
    high, part = number(top), number(1.0 / top)
    last = high - number(1)
    for i in range(x.size):
        u = (x[i] - lo) * inverse
        noise = noise_of(_U(index + _U(i)), k0, k1)
        u = u if u > number(0) else number(0)
        u = u if u < high else high
        k = np.floor(np.sqrt(u * high))
        # The root is off by less than a level. Comparisons with the levels themselves decide.
        k = k - (number(1) if (k * k) * part > u else number(0))
        k = k if k > number(0) else number(0)
        above = k + number(1)
        k = above if (above * above) * part <= u else k
        k = last if k > last else k
        above = k + number(1)
        low = (k * k) * part
        step = (above * above) * part - low
        q = above if noise < (u - low) / step else k
        codes[i] = np.uint8(np.int32(q))


@jit
def factors_of(
        codes: Any, lowest: Any, top: Any, rounding: Any, index: Any, k0: Any, k1: Any,
        out: Any) -> None:
    """Writes what codes stand for, in steps; ``index`` is the flat index of the first."""
    wide_vectors()
    number = out.dtype.type
    low = number(lowest)
    if rounding == _COMPANDED:
        part = number(1.0 / top)
        for i in range(out.size):
            k = number(np.int32(codes[i]))
            out[i] = (k * k) * part
        return
    if rounding != _DITHERED:
        for i in range(out.size):
            out[i] = number(np.int32(codes[i])) + low
        return
    for i in range(out.size):
        noise = number(noise_of(_U(index + _U(i)), k0, k1))
        out[i] = ((number(np.int32(codes[i])) + low) + number(0.5)) - noise


@jit
def round_nearest(x: Any, codes: Any, lo: Any, inverse: Any, lowest: Any, top: Any) -> None:
    """Works like :func:`round_stochastic`, rounding to nearest."""
    wide_vectors()
    number = x.dtype.type
    low, high = number(lowest), number(top)
    for i in range(x.size):
        q = np.rint((x[i] - lo) * inverse)
        q = low if q < low else q
        q = high if q > high else q
        # Subtract floats: numba would subtract integers in 64 bits.
        codes[i] = np.uint8(np.int32(q - low))


@jit
def round_codes(
        rounding: Any, x: Any, codes: Any, lo: Any, inverse: Any, lowest: Any, top: Any, index: Any,
        k0: Any, k1: Any) -> None:
    """Codes of ``x`` by the rounding of this number; arguments as of :func:`round_stochastic`."""
    if rounding == _STOCHASTIC:
        round_stochastic(x, codes, lo, inverse, lowest, top, index, k0, k1)
    elif rounding == _DITHERED:
        round_dithered(x, codes, lo, inverse, lowest, top, index, k0, k1)
    elif rounding == _COMPANDED:
        round_companded(x, codes, lo, inverse, top, index, k0, k1)
    else:
        round_nearest(x, codes, lo, inverse, lowest, top)


@jit
def copy_bytes(source: Any, target: Any) -> None:
    """Copies all of ``source``; the compiler does not turn a slice assignment into vector code."""
    wide_vectors()
    for i in range(source.size):
        target[i] = source[i]


# Each plane is written out below as one loop over its bytes, which the compiler turns into vector code.


@jit
def pack(codes: Any, width: Any, out: Any) -> None:
    """Packs one bucket, see ``packing.pack``."""
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
    """Unpacks one bucket, see ``packing.unpack``."""
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
    """Returns which width a bucket has (1: the mixed width), and where its bytes begin."""
    # With one width no division is needed.
    slot = bucket if multiplier == 1 and shift == 0 else (multiplier * bucket + shift) % n
    if slot < mixed:
        return 1, slot * (size * widths[1] // 8)
    return 0, mixed * (size * widths[1] // 8) + (slot - mixed) * (size * widths[0] // 8)


@jit
def dequantize(codes: Any, lowest: Any, scale: Any, lo: Any, limit: Any, out: Any) -> None:
    """Dequantizes codes that are counted from ``lowest``; ``out`` may be shorter than ``codes``."""
    wide_vectors()
    number = out.dtype.type
    low = number(lowest)
    for i in range(out.size):
        y = (number(np.int32(codes[i])) + low) * scale + lo
        y = limit if y > limit else y
        out[i] = -limit if y < -limit else y
