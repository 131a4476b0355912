"""Computes scale and offset of buckets, in numba: see :mod:`brevitas_bp.format.stages`.

Minima and maxima are taken on the sortable integer form of a float, in which NaN is extreme.
"""

import math
from typing import Any

import numpy as np
import torch

from brevitas_bp.format.arithmetic import LARGEST_END, RANGE_LIMIT
from brevitas_bp.format.stages import L2, MAX, MIN_MAX, ZERO_IN_RANGE
from brevitas_bp.kernels.cpu.codes import copy_bytes
from brevitas_bp.kernels.cpu.compiling import jit, wide_vectors, window

_BF16_MIN = float(torch.finfo(torch.bfloat16).min)
#: The scale rules that :func:`ranges` and :func:`scales_of_ranges` implement.
RULES = frozenset({MIN_MAX, MAX, L2, ZERO_IN_RANGE})
_MIN_MAX, _L2 = MIN_MAX.number, L2.number


@jit
def extremes(bits: Any) -> Any:
    """Returns the smallest and largest element, in the integer form that sorts like the floats."""
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
    """Returns the largest magnitude, as the bits of the float."""
    wide_vectors()
    magnitude = bits.dtype.type(np.iinfo(bits.dtype).max)
    peak = bits.dtype.type(0)
    for i in range(bits.size):
        peak = max(peak, bits.dtype.type(bits[i] & magnitude))
    return peak


@jit
def tree_sum(terms: Any) -> Any:
    """Sums ``terms`` by the binary tree of ``arithmetic.l2_norm``; overwrites ``terms``."""
    n = terms.size
    while n > 1:
        half = (n + 1) // 2
        for i in range(n - half):
            terms[i] += terms[half + i]
        n = half
    return terms[0]


@jit
def squares(x: Any, unit: Any, out: Any) -> None:
    """Writes the squares in float64; float64 data is divided by ``unit`` first."""
    wide_vectors()
    if np.finfo(x.dtype).bits == 64:
        for i in range(x.size):
            out[i] = (x[i] / unit) * (x[i] / unit)
    else:
        for i in range(x.size):
            out[i] = np.float64(x[i]) * np.float64(x[i])


@jit
def norm_unit(peak: Any, dtype: Any) -> Any:
    """Returns the number that the elements of a norm are divided by."""
    return np.float64(peak) if np.finfo(dtype).bits == 64 and peak > 0 else 1.0


@jit
def _norm(x: Any, peak: Any, scratch: Any) -> Any:
    """See ``arithmetic.l2_norm``."""
    unit = norm_unit(peak, x.dtype)
    squares(x, unit, scratch)
    return x.dtype.type(math.sqrt(tree_sum(scratch)) * unit)


@jit
def reciprocal(scale: Any, dtype: Any) -> Any:
    """See ``arithmetic.reciprocal``."""
    return dtype.type(1) / scale if scale >= dtype.type(np.finfo(dtype).tiny) else dtype.type(0)


@jit
def _round_down_bf16(words: Any, sign: Any) -> None:
    """Rounds floats, given as integers, towards -inf (``sign`` 0) or +inf: ``arithmetic.round_down``."""
    wide_vectors()
    integer = words.dtype.type
    flip = integer(np.iinfo(words.dtype).min if sign else 0)
    for i in range(words.size):
        word = integer(words[i] ^ flip)
        truncated = integer(word & integer(-65536))
        further = word < integer(0) and truncated != word
        words[i] = integer(truncated + integer(65536 if further else 0)) ^ flip


@jit
def affine_metadata(lowest: Any, highest: Any, tops: Any, bf16: Any, form: Any) -> None:
    """Computes offsets and scales in-place from the extremes of buckets; NaN or Inf give NaN.

    Args:
        lowest: of each bucket, the smallest element as :func:`extremes` returns it. Afterwards the
            memory holds the offsets, as floats.
        highest: as ``lowest``, with the largest element. Afterwards the memory holds the scales.
        tops: largest code of each bucket, as floats.
        bf16: whether metadata are bfloat16.
        form: see ``BucketQuantSpec.offset_form``.
    """
    wide_vectors()
    word, number = lowest.dtype.type, tops.dtype.type
    info = np.iinfo(lowest.dtype)
    sign, magnitude = word(info.bits - 1), word(info.max)
    mantissa = 23 if info.bits == 32 else 52
    infinite = word(info.max - ((1 << mantissa) - 1))
    # This NaN has no lower bits set, which rounding to bfloat16 would carry.
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
    if form == 2:
        _zero_in_range(offsets, scales, tops)
        return
    if bf16:
        _round_down_bf16(lowest, 0)
        least = number(_BF16_MIN)
        for i in range(tops.size):
            offsets[i] = least if offsets[i] < least else offsets[i]
    for i in range(tops.size):
        scales[i] -= offsets[i]
    finish_scales(scales, tops, bf16)
    if form == 1:
        for i in range(tops.size):
            inverse = reciprocal(scales[i], tops.dtype)
            if inverse > number(0):
                offsets[i] = -number(np.rint(-offsets[i] * inverse)) * scales[i] + number(0)


@jit
def _zero_in_range(offsets: Any, scales: Any, tops: Any) -> None:
    """Turns minima and maxima into offsets and scales, in place: ``arithmetic.zero_in_range``."""
    number = tops.dtype.type
    one, limit = number(1), number(np.finfo(tops.dtype).max * LARGEST_END)
    for i in range(tops.size):
        if math.isnan(offsets[i]):
            continue
        top = tops[i]
        low = number(min(max(number(0), -offsets[i]), limit) + number(0))
        high = number(min(max(number(0), scales[i]), limit) + number(0))
        below = number(low / top)
        share = number(below * reciprocal(number(below + number(high / top)), tops.dtype))
        zero = number(np.floor(number(share * top)))
        zero = min(max(zero, one), number(top - one))
        if low == 0:
            zero = number(0)
        elif high == 0:
            zero = top
        scale = max(number(low / max(zero, one)), number(high / max(number(top - zero), one)))
        scales[i] = scale
        usable = scale >= number(np.finfo(tops.dtype).tiny)
        offsets[i] = number(-zero * scale) + number(0) if usable else number(0)


@jit
def finish_scales(ranges: Any, tops: Any, bf16: Any) -> None:
    """Turns the ranges of buckets (NaN for none) into scales, in-place."""
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
def scratch_size(rule: Any, size: Any) -> Any:
    """Float64 numbers that :func:`ranges` needs for a bucket of ``size`` elements."""
    return size if rule == _L2 else 1


@jit
def scales_of_ranges(
        rule: Any, first: Any, second: Any, tops: Any, bf16: Any, form: Any) -> None:
    """Turns what :func:`ranges` found into offsets (``first``) and scales (``second``), in place."""
    if rule == _MIN_MAX:
        affine_metadata(first, second, tops, bf16, form)
    else:
        finish_scales(second.view(tops.dtype), tops, bf16)
        first.view(tops.dtype)[:] = tops.dtype.type(0)


@jit
def ranges(
        values: Any, words: Any, i: Any, rule: Any, first: Any, second: Any, norms: Any,
        scratch: Any) -> None:
    """Computes the range of a bucket: its extremes, or a norm (NaN if the bucket has none)."""
    if rule == _MIN_MAX:
        first[i], second[i] = extremes(words)
        return
    number = values.dtype.type
    second[i] = largest_magnitude(words)
    peak = norms[i]
    if not np.isfinite(peak):
        norms[i] = number(np.nan)
    elif rule == _L2:
        norms[i] = _norm(values, peak, scratch)


# Metadata are stored as 16-bit words, lowest first. bfloat16 metadata take one word (the upper half of
# a float32), other metadata two or four. So one compiled function serves both metadata dtypes.


@jit
def store(words: Any, begin: Any, values: Any, bf16: Any) -> None:
    """Writes ``values`` from place ``begin`` on."""
    for i in range(values.size):
        # NaN gets one bit pattern, whichever operation made it.
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
    """Reads ``values`` that :func:`store` wrote, from place ``begin`` on."""
    parts = values.view(np.uint16)
    if bf16:
        for i in range(values.size):
            parts[2 * i] = 0
            parts[2 * i + 1] = words[begin + i]
    else:
        per_value = np.finfo(values.dtype).bits // 16
        copy_bytes(window(words, begin * per_value, parts.size), parts)
