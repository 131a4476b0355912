"""Fast form of :mod:`brevitas_bp.format.relative` for CPU tensors, compiled by numba.

A bucket is converted in the cache. The arithmetic is that of ``exponent_of`` and ``power_of_two`` in
:mod:`brevitas_bp.format.arithmetic`, step by step. The reference serves float64.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from brevitas_bp.format import relative
from brevitas_bp.format.arithmetic import EXP2, LOG2, ROOT
from brevitas_bp.format.relative import (
    BUCKET,
    FIRST,
    GRAIN,
    INFINITE,
    LEVELS,
    NAN,
    NEGATIVE,
    SMALLEST,
    STEP,
    ZERO,
    bucket_count,
)
from brevitas_bp.kernels.cpu.codes import noise_keys, noise_of
from brevitas_bp.kernels.cpu.compiling import float_of, inline, jit, wide_vectors, window
from brevitas_bp.kernels.cpu.metadata import extremes
from brevitas_bp.kernels.cpu.threads import run_in_pool

_F, _I, _N, _U = np.float32, np.int32, np.uint64, np.uint32
_MAGNITUDE, _MANTISSA, _HALF, _NORMAL = _I(0x7FFFFFFF), _I(0x7FFFFF), _I(0x3F000000), _I(0x00800000)
_INFINITY = _I(0x7F800000)
_ROOT = _F(ROOT)
_L0, _L1, _L2, _L3 = (_F(c) for c in LOG2)
_E0, _E1, _E2, _E3, _E4, _E5, _E6 = (_F(c) for c in EXP2)
_GRAIN, _STEP, _SMALLEST, _LAST = _F(GRAIN), _F(STEP), _F(SMALLEST), _F(LEVELS - 2)


@jit
def _scale(x: Any, words: Any, scaled: Any) -> Any:
    """Writes magnitudes, subnormal ones times 2**24; returns whether all are positive and finite."""
    wide_vectors()
    others = _I(0)
    for i in range(_N(x.size)):
        bits = _I(words[i] & _MAGNITUDE)
        scaled[i] = abs(x[i]) * (_F(2.0**24) if bits < _NORMAL else _F(1))
        others |= _I(bits == _I(0)) | _I(bits >= _INFINITY)
    return others == _I(0)


@jit
def _take_logarithms(words: Any, scaled_words: Any, out: Any) -> None:
    """Writes the logarithms of positive finite elements; the others get any numbers."""
    wide_vectors()
    for i in range(_N(out.size)):
        small = _I(words[i] & _MAGNITUDE) < _NORMAL
        bits = scaled_words[i]
        m = float_of(_I(_I(bits & _MANTISSA) | _HALF))
        exponent = _F(_I(bits >> _I(23))) - (_F(150) if small else _F(126))
        r = (m - _ROOT) / (m + _ROOT)
        square = r * r
        total = ((square * _L3 + _L2) * square + _L1) * square + _L0
        out[i] = total * r + (exponent - _F(0.5))


@jit
def _ends_of(logarithms: Any, words: Any, ordinary: Any, log_words: Any, ends: Any) -> Any:
    """Returns the least and the largest logarithm of positive finite elements; else zeros."""
    if ordinary:
        ends[0], ends[1] = extremes(log_words)
        for i in range(2):
            ends[i] ^= (ends[i] >> _I(31)) & _MAGNITUDE
        found = ends.view(np.float32)
        return found[0], found[1]
    low, high, any_counted = _F(0), _F(0), False
    for i in range(logarithms.size):
        bits = _I(words[i] & _MAGNITUDE)
        if bits != _I(0) and bits < _INFINITY:
            low = logarithms[i] if not any_counted or logarithms[i] < low else low
            high = logarithms[i] if not any_counted or logarithms[i] > high else high
            any_counted = True
    return low, high


@inline
def _level(place: Any, low: Any, step: Any, largest: Any) -> Any:
    exponent = place * step + low
    whole = np.rint(exponent)
    f = exponent - whole
    total = (((((f * _E6 + _E5) * f + _E4) * f + _E3) * f + _E2) * f + _E1) * f + _E0
    half = np.floor(whole * _F(0.5))
    level = total * float_of(_I(_I(_I(half) + _I(127)) << _I(23)))
    level = level * float_of(_I(_I(_I(whole - half) + _I(127)) << _I(23)))
    return level if level < largest else largest


@jit
def _round(
        x: Any, logarithms: Any, low: Any, step: Any, largest: Any, index: Any, k0: Any, k1: Any,
        codes: Any) -> None:
    """Writes the codes of positive finite magnitudes; ``index`` is the flat index of ``x[0]``."""
    wide_vectors()
    divisor = step if step > _SMALLEST else _SMALLEST
    for i in range(_N(x.size)):
        below = np.floor((logarithms[i] - low) / divisor)
        below = below if below > _F(0) else _F(0)
        below = below if below < _LAST else _LAST
        level = _level(below, low, step, largest)
        above = _level(below + _F(1), low, step, largest)
        noise = noise_of(_U(index + _U(i)), k0, k1)
        up = noise * (above - level) < abs(x[i]) - level
        code = below + (_F(1 + FIRST) if up else _F(FIRST)) + (_F(NEGATIVE) if x[i] < _F(0) else _F(0))
        codes[i] = np.uint8(_I(code))


@jit
def _encode(
        begin: Any, end: Any, x: Any, words: Any, first: Any, seed: Any, largest: Any, codes: Any,
        lows: Any, reaches: Any) -> None:
    """Encodes buckets ``begin .. end - 1``; ``first`` is the flat index of ``x[0]``."""
    k0, k1 = noise_keys(seed, 0)
    buffers = np.empty((2, BUCKET), np.int32)
    ends = np.empty(2, np.int32)
    for bucket in range(begin, end):
        start = bucket * BUCKET
        size = min(BUCKET, x.size - start)
        part, bits, target = window(x, start, size), window(words, start, size), window(
            codes, start, size)
        scaled, log_words = buffers[0][:size], buffers[1][:size]
        logarithms = log_words.view(np.float32)
        ordinary = _scale(part, bits, scaled.view(np.float32))
        _take_logarithms(bits, scaled, logarithms)
        low, high = _ends_of(logarithms, bits, ordinary, log_words, ends)
        low = np.floor(low / _GRAIN) * _GRAIN
        reach = np.ceil((high - low) / _GRAIN) * _GRAIN
        lows[bucket], reaches[bucket] = low, reach
        _round(part, logarithms, low, reach * _STEP, largest, _U(first + start), k0, k1, target)
        if not ordinary:
            for i in range(size):
                magnitude = _I(bits[i] & _MAGNITUDE)
                sign = np.uint8(NEGATIVE) if part[i] < _F(0) else np.uint8(0)
                if magnitude == _I(0):
                    target[i] = np.uint8(ZERO)
                elif magnitude == _INFINITY:
                    target[i] = np.uint8(INFINITE) | sign
                elif magnitude > _INFINITY:
                    target[i] = np.uint8(NAN)


@jit
def _look_up(codes: Any, low: Any, step: Any, largest: Any, out: Any) -> None:
    wide_vectors()
    for i in range(_N(out.size)):
        place = _I(codes[i] & np.uint8(NEGATIVE - 1))
        value = _level(_F(place) - _F(FIRST), low, step, largest)
        value = _F(0) if place == _I(ZERO) else value
        value = _F(np.inf) if place == _I(INFINITE) else value
        value = _F(np.nan) if place == _I(NAN) else value
        out[i] = -value if codes[i] >= np.uint8(NEGATIVE) else value


@jit
def _decode(
        begin: Any, end: Any, codes: Any, lows: Any, reaches: Any, largest: Any, out: Any) -> None:
    """Decodes buckets ``begin .. end - 1``."""
    for bucket in range(begin, end):
        start = bucket * BUCKET
        size = min(BUCKET, out.size - start)
        _look_up(window(codes, start, size), lows[bucket], reaches[bucket] * _STEP, largest,
                 window(out, start, size))


def encode(x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """See :func:`brevitas_bp.format.relative.encode`."""
    if x.dtype == torch.float64:
        return relative.encode(x, seed)
    codes = torch.empty(len(x), dtype=torch.uint8, device="cpu")
    ranges = torch.empty(2, bucket_count(len(x)), dtype=torch.float32, device="cpu")
    largest = _F(torch.finfo(x.dtype).max)
    whole = [(slice(0, len(x)), slice(0, ranges.shape[1]))]
    for place, buckets in whole if x.dtype == torch.float32 else relative.parts(len(x)):
        part = x[place].to(torch.float32).contiguous()
        run_in_pool(_encode, (), 0, bucket_count(len(part)), BUCKET, (
            part.numpy(), part.view(torch.int32).numpy(), place.start, np.uint64(seed), largest,
            codes[place].numpy(), *ranges[:, buckets].numpy()))
    return codes, ranges.to(relative.range_dtype(x.dtype))


def decode(codes: Tensor, ranges: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`brevitas_bp.format.relative.decode`."""
    if dtype == torch.float64:
        return relative.decode(codes, ranges, dtype)
    out = torch.empty(len(codes), dtype=dtype, device="cpu")
    computed, largest = ranges.to(torch.float32), _F(torch.finfo(dtype).max)
    whole = [(slice(0, len(codes)), slice(0, ranges.shape[1]))]
    for place, buckets in whole if dtype == torch.float32 else relative.parts(len(codes)):
        part = out[place] if dtype == torch.float32 else torch.empty(
            place.stop - place.start, dtype=torch.float32, device="cpu")
        run_in_pool(_decode, (), 0, bucket_count(len(part)), BUCKET, (
            codes[place].numpy(), *computed[:, buckets].numpy(), largest, part.numpy()))
        if dtype != torch.float32:
            out[place] = part
    return out
