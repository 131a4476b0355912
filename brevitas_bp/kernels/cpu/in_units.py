"""Buckets in units, in numba: centred, rotated or coded by levels. See ``bucket.encode_in_units``."""

from typing import Any

import numpy as np
import torch

from brevitas_bp.kernels.cpu.compiling import jit, wide_vectors
from brevitas_bp.kernels.cpu.metadata import tree_sum
from brevitas_bp.kernels.cpu.rotation import random_words, rotate, rotate_back

_U = np.uint32
_BF16_MAX = np.float32(torch.finfo(torch.bfloat16).max)


@jit
def unit_of(peaks: Any, units: Any, i: Any) -> Any:
    """Replaces the magnitude ``peaks[i]``, given as bits, by its unit.

    See ``arithmetic.unit_of``. Returns the reciprocal of the unit. ``units`` is the same memory as
    floats.
    """
    word = peaks.dtype.type
    mantissa, top = (word(23), word(254)) if np.iinfo(word).bits == 32 else (word(52), word(2046))
    exponent = word(min(max(word(peaks[i] >> mantissa), word(1)), word(top - word(1))))
    peaks[i] = word(word(top - exponent) << mantissa)
    inverse = units[i]
    peaks[i] = word(exponent << mantissa)
    return inverse


@jit
def round_to_nearest(x: Any, bits: Any, bf16: Any) -> None:
    """Rounds numbers to the nearest finite values that the metadata dtype holds, in place.

    See ``arithmetic.to_nearest``. ``bits`` is the same memory as integers.
    """
    wide_vectors()
    number = x.dtype.type
    limit = number(np.finfo(number).max)
    if bf16 and np.finfo(number).bits == 32:
        limit = number(_BF16_MAX)
        for i in range(x.size):
            word = np.int32(bits[i])
            even = np.int32((word >> np.int32(16)) & np.int32(1))
            rounded = np.int32(np.int32(word + np.int32(0x7FFF)) + even)
            bits[i] = np.int32((rounded if x[i] == x[i] else word) & np.int32(-65536))
    for i in range(x.size):
        y = limit if x[i] > limit else x[i]
        x[i] = -limit if y < -limit else y


@jit
def round_at_random(x: Any, bits: Any, bf16: Any, words: Any) -> None:
    """Rounds numbers ``>= 0`` at random, without bias, in place; see ``arithmetic.to_random``."""
    wide_vectors()
    number = x.dtype.type
    limit = number(np.finfo(number).max)
    if bf16 and np.finfo(number).bits == 32:
        limit = number(_BF16_MAX)
        for i in range(x.size):
            word = np.int32(np.int32(bits[i]) + np.int32(words[i] & _U(0xFFFF)))
            bits[i] = np.int32(word & np.int32(-65536))
    for i in range(x.size):
        x[i] = limit if x[i] > limit else x[i]


@jit
def to_nearest(x: Any, bf16: Any, scratch: Any, bits: Any) -> Any:
    """Returns one number rounded by :func:`round_to_nearest`.

    ``scratch`` and ``bits`` are the same memory, as floats and as integers.
    """
    scratch[0] = x
    round_to_nearest(scratch, bits, bf16)
    return scratch[0]


@jit
def _to_units(x: Any, inverse: Any, first: Any, terms: Any) -> None:
    """Divides a bucket by its unit, and writes its differences from ``first``."""
    wide_vectors()
    for i in range(x.size):
        v = x[i] * inverse
        x[i] = v
        terms[i] = v - first


@jit
def _centre(x: Any, mean: Any, factor: Any) -> None:
    wide_vectors()
    for i in range(x.size):
        x[i] = (x[i] - mean) * factor


@jit
def enter_units(
        x: Any, valid: Any, inverse: Any, unit: Any, centres: Any, bf16: Any, transform: Any,
        bucket: Any, r0: Any, r1: Any, words: Any, terms: Any, scratch: Any, bits: Any) -> Any:
    """Centres and rotates a bucket in place, in units; returns its mean, or 0.

    Args:
        x: the padded bucket.
        valid: elements without padding.
        inverse: reciprocal of the unit.
        unit: the unit.
        centres: whether the mean is subtracted.
        bf16: whether metadata are bfloat16.
        transform: number of rotations.
        bucket: number of the bucket.
        r0: first key of the signs.
        r1: second key of the signs.
        words: scratch for the signs.
        terms: scratch of the size of the bucket.
        scratch: the memory of one number.
        bits: the same memory as an integer.
    """
    number = x.dtype.type
    factor = number(1)
    for _ in range(transform):
        factor = factor * number(1.0 / x.size)
    mean = number(0)
    if centres:
        first = x[0] * inverse
        for i in range(valid, x.size):
            x[i] = x[0]
        _to_units(x, inverse, first, terms)
        mean = to_nearest(
            (first + tree_sum(terms) / number(valid)) * unit, bf16, scratch, bits)
        _centre(x, mean * inverse, factor)
        for i in range(valid, x.size):
            x[i] = number(0)
    else:
        _centre(x, number(0), inverse)
        if transform:
            _centre(x, number(0), factor)
    if transform:
        random_words(_U((bucket * words.size) & 0xFFFFFFFF), r0, r1, words)
        rotate(x, words, transform)
    return mean


@jit
def scale_in_units(x: Any, scale: Any, lo: Any, peaks: Any, units: Any) -> Any:
    """Writes factors times ``scale`` plus ``lo``, in units; returns the unit.

    ``peaks`` and ``units`` are the memory of one number, as an integer and as a float.
    """
    units[0] = scale if scale > abs(lo) or np.isnan(scale) else abs(lo)
    inverse = unit_of(peaks, units, 0)
    _scale(x, scale * inverse, lo * inverse)
    return units[0]


@jit
def leave_units(
        x: Any, scale: Any, lo: Any, limit: Any, transform: Any, bucket: Any, r0: Any, r1: Any,
        words: Any, out: Any) -> None:
    """Rotates a bucket back, and writes it times ``scale`` plus ``lo``; see ``decode_in_units``."""
    if transform:
        random_words(_U((bucket * words.size) & 0xFFFFFFFF), r0, r1, words)
        rotate_back(x, words, transform)
    _finish(x, scale, lo, limit, out)


@jit
def _scale(x: Any, scale: Any, lo: Any) -> None:
    wide_vectors()
    for i in range(x.size):
        x[i] = x[i] * scale + lo


@jit
def _finish(x: Any, scale: Any, lo: Any, limit: Any, out: Any) -> None:
    wide_vectors()
    for i in range(out.size):
        y = x[i] * scale + lo
        y = limit if y > limit else y
        out[i] = -limit if y < -limit else y


