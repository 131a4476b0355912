"""Groups of rotated buckets that fit into vector registers, in numba.

The bytes are those of :mod:`brevitas_bp.kernels.cpu.in_units` and :mod:`brevitas_bp.kernels.cpu.levels`.

NOTE [ One step for all buckets ]
A step of one bucket ends with a chain of dependent operations: a sum across a vector, a root, a
division. So each step is done for all buckets of a group before the next step. The processor then runs
the chain of one bucket beside the work of the next buckets.
"""

import math
from typing import Any

import numpy as np

from brevitas_bp.kernels.cpu.codes import locate
from brevitas_bp.kernels.cpu.compiling import inline, jit, prefetch, wide_vectors, window
from brevitas_bp.kernels.cpu.in_units import round_at_random, round_to_nearest, unit_of
from brevitas_bp.kernels.cpu.levels import encode_levels
from brevitas_bp.kernels.cpu.metadata import reciprocal
from brevitas_bp.kernels.cpu.registers import (
    decode_packed,
    differences,
    encode_packed,
    peak_of,
    turn,
    turn_back,
)
from brevitas_bp.kernels.cpu.rotation import random_words

_U = np.uint32


@inline
def in_registers(size: Any, transform: Any) -> Any:
    """Returns whether this module handles buckets of this size."""
    # A rotated bucket has a power of two of elements, 16 or more.
    return transform != 0 and size <= 256


@inline
def packs_levels(size: Any, width: Any) -> Any:
    """Returns whether levels of this width are packed in registers, and unpacked there."""
    return size >= 128 and width <= 4


@jit
def find_peaks(
        x: Any, copies: Any, starts: Any, held: Any, size: Any, peaks: Any) -> None:
    """Writes the largest magnitudes of buckets, as bits.

    Args:
        x: the tensor, as integers.
        copies: buckets that are not part of ``x``, as integers, each at its place in the group.
        starts: places of the others in ``x``.
        held: which buckets are copies.
        size: elements of a bucket.
        peaks: magnitudes of the group.
    """
    wide_vectors()
    for i in range(peaks.size):
        values = window(copies, i * size, size) if held[i] else window(x, starts[i], size)
        if size == 256:
            peaks[i] = peak_of(values, 16)
        elif size == 128:
            peaks[i] = peak_of(values, 8)
        elif size == 64:
            peaks[i] = peak_of(values, 4)
        elif size == 32:
            peaks[i] = peak_of(values, 2)
        else:
            peaks[i] = peak_of(values, 1)


@jit
def rotate_group(
        x: Any, copies: Any, starts: Any, valid: Any, held: Any, size: Any, centres: Any, bf16: Any,
        transform: Any, first: Any, r0: Any, r1: Any, unit_bits: Any, units: Any, inverses: Any,
        means: Any, mean_bits: Any, energies: Any, words: Any) -> None:
    """Centres and rotates buckets in units, as ``in_units.enter_units`` does.

    Args:
        x: the tensor.
        copies: see :func:`find_peaks`. Afterwards it holds all buckets.
        starts: see :func:`find_peaks`.
        held: see :func:`find_peaks`.
        size: elements of a bucket.
        valid: elements of each bucket without padding.
        centres: whether means are subtracted.
        bf16: whether metadata are bfloat16.
        transform: number of rotations.
        first: number of the first bucket.
        r0: first key of the signs.
        r1: second key of the signs.
        unit_bits: the largest magnitudes, as bits. Afterwards the memory holds the units.
        units: the same memory as floats.
        inverses: gets the reciprocals of the units.
        means: gets the means, if ``centres``.
        mean_bits: the same memory as integers.
        energies: gets the sums of squares after the rotation.
        words: scratch for the signs of a bucket.
    """
    wide_vectors()
    number, count = x.dtype.type, starts.size
    for i in range(count):
        inverses[i] = unit_of(unit_bits, units, i)
        means[i] = number(0)
    if centres:
        for i in range(count):
            values = window(copies, i * size, size) if held[i] else window(x, starts[i], size)
            for j in range(valid[i], size):
                values[j] = values[0]
            inverse = inverses[i]
            means[i] = values[0] * inverse + _differences(values, inverse) / number(valid[i])
        for i in range(count):
            means[i] = means[i] * units[i]
        round_to_nearest(means, mean_bits, bf16)
    for i in range(count):
        target = window(copies, i * size, size)
        values = target if held[i] else window(x, starts[i], size)
        for j in range(0, size, 64 // x.itemsize):
            prefetch(x, starts[i] + count * size + j)
        inverse, mean = inverses[i], means[i] * inverses[i]
        if valid[i] < size:
            for j in range(valid[i]):
                values[j] = values[j] * inverse - mean
            for j in range(valid[i], size):
                values[j] = number(0)
            inverse, mean = number(1), number(0)
        random_words(_U(((first + i) * words.size) & 0xFFFFFFFF), r0, r1, words)
        energies[i] = _turn(values, inverse, mean, words, target, transform)


@inline
def _differences(x: Any, inverse: Any) -> Any:
    if x.size == 256:
        return differences(x, inverse, 16)
    if x.size == 128:
        return differences(x, inverse, 8)
    if x.size == 64:
        return differences(x, inverse, 4)
    if x.size == 32:
        return differences(x, inverse, 2)
    return differences(x, inverse, 1)


@inline
def _turn(x: Any, inverse: Any, mean: Any, words: Any, out: Any, rotations: Any) -> Any:
    if rotations == 2:
        if x.size == 256:
            return turn(x, inverse, mean, words, out, 2, 16)
        if x.size == 128:
            return turn(x, inverse, mean, words, out, 2, 8)
        if x.size == 64:
            return turn(x, inverse, mean, words, out, 2, 4)
        if x.size == 32:
            return turn(x, inverse, mean, words, out, 2, 2)
        return turn(x, inverse, mean, words, out, 2, 1)
    if x.size == 256:
        return turn(x, inverse, mean, words, out, 1, 16)
    if x.size == 128:
        return turn(x, inverse, mean, words, out, 1, 8)
    if x.size == 64:
        return turn(x, inverse, mean, words, out, 1, 4)
    if x.size == 32:
        return turn(x, inverse, mean, words, out, 1, 2)
    return turn(x, inverse, mean, words, out, 1, 1)


@jit
def encode_group(
        copies: Any, size: Any, first: Any, n: Any, mixed: Any, multiplier: Any, shift: Any,
        widths: Any, bf16: Any, m0: Any, m1: Any, units: Any, inverses: Any, energies: Any, scales: Any,
        scale_bits: Any, terms: Any, codes: Any, payload: Any, random: Any) -> None:
    """Encodes the buckets in ``copies`` by levels; ``scales`` gets the scales to store.

    Codes of a width that is not packed here are written to ``codes``. ``inverses`` is overwritten, and
    ``random`` is scratch for one word of each bucket. The other arguments are those of
    :func:`rotate_group` and ``buckets.encode``.
    """
    wide_vectors()
    number = copies.dtype.type
    for i in range(scales.size):
        spread = number(math.sqrt(np.float64(energies[i] * number(1.0 / size))))
        inverses[i] = reciprocal(spread, copies.dtype)
    for i in range(scales.size):
        kind, position = locate(first + i, size, n, mixed, multiplier, shift, widths)
        width, z = widths[kind], window(copies, i * size, size)
        if packs_levels(size, width):
            packed = window(payload, position, size * width // 8)
            scales[i] = _encode(z, inverses[i], packed, width)
        else:
            scales[i] = encode_levels(z, inverses[i], width, window(codes, i * size, size), terms)
    for i in range(scales.size):
        along = scales[i]
        scales[i] = (energies[i] / along if along > number(0) else number(0)) * units[i]
    random_words(_U(first & 0xFFFFFFFF), m0, m1, random)
    round_at_random(scales, scale_bits, bf16, random)


@inline
def _encode(z: Any, inverse: Any, packed: Any, width: Any) -> Any:
    if z.size == 256:
        if width == 1:
            return encode_packed(z, inverse, packed, 1, 16)
        if width == 2:
            return encode_packed(z, inverse, packed, 2, 16)
        if width == 3:
            return encode_packed(z, inverse, packed, 3, 16)
        return encode_packed(z, inverse, packed, 4, 16)
    if width == 1:
        return encode_packed(z, inverse, packed, 1, 8)
    if width == 2:
        return encode_packed(z, inverse, packed, 2, 8)
    if width == 3:
        return encode_packed(z, inverse, packed, 3, 8)
    return encode_packed(z, inverse, packed, 4, 8)


@jit
def unpack_levels(packed: Any, width: Any, out: Any) -> None:
    """Writes the levels of the packed codes of a bucket."""
    wide_vectors()
    if out.size == 256:
        if width == 1:
            decode_packed(packed, out, 1, 16)
        elif width == 2:
            decode_packed(packed, out, 2, 16)
        elif width == 3:
            decode_packed(packed, out, 3, 16)
        else:
            decode_packed(packed, out, 4, 16)
    elif width == 1:
        decode_packed(packed, out, 1, 8)
    elif width == 2:
        decode_packed(packed, out, 2, 8)
    elif width == 3:
        decode_packed(packed, out, 3, 8)
    else:
        decode_packed(packed, out, 4, 8)


@jit
def rotate_back_into(
        y: Any, bucket: Any, r0: Any, r1: Any, rotations: Any, words: Any, scale: Any, lo: Any,
        limit: Any, out: Any) -> None:
    """Rotates a bucket back, and writes its decoded values to ``out``, which may be shorter."""
    wide_vectors()
    random_words(_U((bucket * words.size) & 0xFFFFFFFF), r0, r1, words)
    target = out if out.size == y.size else y
    if rotations == 2:
        if y.size == 256:
            turn_back(y, words, scale, lo, limit, target, 2, 16)
        elif y.size == 128:
            turn_back(y, words, scale, lo, limit, target, 2, 8)
        elif y.size == 64:
            turn_back(y, words, scale, lo, limit, target, 2, 4)
        elif y.size == 32:
            turn_back(y, words, scale, lo, limit, target, 2, 2)
        else:
            turn_back(y, words, scale, lo, limit, target, 2, 1)
    elif y.size == 256:
        turn_back(y, words, scale, lo, limit, target, 1, 16)
    elif y.size == 128:
        turn_back(y, words, scale, lo, limit, target, 1, 8)
    elif y.size == 64:
        turn_back(y, words, scale, lo, limit, target, 1, 4)
    elif y.size == 32:
        turn_back(y, words, scale, lo, limit, target, 1, 2)
    else:
        turn_back(y, words, scale, lo, limit, target, 1, 1)
    if out.size < y.size:
        for i in range(out.size):
            out[i] = y[i]
