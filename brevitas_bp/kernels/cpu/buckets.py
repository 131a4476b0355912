"""The numba source of the bucket kernels, which :mod:`brevitas_bp.kernels.cpu.launch` calls.

One source serves float32 and float64: numba compiles it for the dtype of its arrays, and constants take
this dtype (``x.dtype.type``). Each float array ``x`` has a partner ``bits``, the same memory as
integers.

The kernels give the bytes of :mod:`brevitas_bp.format.reference`: the order of operations is the same,
and there is no fused multiply-add (no ``fastmath``).
"""

from typing import Any

import numpy as np

from brevitas_bp.format.stages import CENTRED, COMPANDED, DITHERED, UNBIASED
from brevitas_bp.kernels.cpu import levels
from brevitas_bp.kernels.cpu.codes import (
    ROUNDINGS,
    copy_bytes,
    dequantize,
    factors_of,
    locate,
    pack,
    round_codes,
    unpack,
)
from brevitas_bp.kernels.cpu.compiling import jit, prefetch, window
from brevitas_bp.kernels.cpu.derivatives import differentiate
from brevitas_bp.kernels.cpu.in_units import (
    enter_units,
    leave_units,
    round_at_random,
    scale_in_units,
    to_nearest,
    unit_of,
)
from brevitas_bp.kernels.cpu.levels import decode_levels, encode_bucket
from brevitas_bp.kernels.cpu.metadata import (
    RULES,
    largest_magnitude,
    load,
    ranges,
    reciprocal,
    scales_of_ranges,
    scratch_size,
    store,
)
from brevitas_bp.kernels.cpu.rotated import (
    encode_group,
    find_peaks,
    in_registers,
    packs_levels,
    rotate_back_into,
    rotate_group,
    unpack_levels,
)
from brevitas_bp.kernels.cpu.rotation import TRANSFORMS, random_words
from brevitas_bp.kernels.cpu.units import denormalize, normalize, place
from brevitas_bp.kernels.launchers import CODE_RANGES

#: The stages that these kernels implement.
COVERED = ROUNDINGS | RULES | CODE_RANGES | TRANSFORMS | levels.RULES | levels.CODES
_U = np.uint32
_UNBIASED, _CENTRED = UNBIASED.number, CENTRED.number
_DITHERED, _COMPANDED = DITHERED.number, COMPANDED.number
# Elements of a group of buckets: half of a first-level cache.
_GROUP = 1 << 12
#: Replaces the number of a derivative: the input is normalized.
NORMALIZED = -1


@jit
def encode(
        x: Any, bits: Any, first: Any, begin: Any, end: Any, size: Any, n: Any, mixed: Any,
        multiplier: Any, shift: Any, widths: Any, tops: Any, lowests: Any, rule: Any, bf16: Any,
        form: Any, rounding: Any, transform: Any, keys: Any, payload: Any, metadata: Any,
        derivative: Any, row: Any, per_row: Any, index: Any, shifts: Any, scales_of: Any,
        inner: Any, largest: Any, divides: Any, pads_with_zero: Any, affine: Any) -> None:
    """Encodes buckets ``begin .. end - 1``; ``x`` starts with bucket ``first``, at element ``index``.

    If ``derivative`` is not 0, the kernel encodes the derivative of that function at ``x``. With
    :data:`NORMALIZED` it encodes ``x`` normalized by :func:`normalize`. :func:`place` explains rows.

    ``metadata`` holds the scales, then for affine codes the offsets, as :func:`store` writes them.

    Buckets are processed in groups that stay in the cache. For each group, the kernel computes the
    ranges of all buckets, then their scales in vector code, then their codes, then their bytes.
    """
    number = x.dtype.type
    group, line = max(1, _GROUP // size), 512 // np.finfo(x.dtype).bits
    (k0, k1), (r0, r1), (m0, m1) = keys
    by_levels = rule in (_UNBIASED, _CENTRED)
    in_units, whole = transform != 0 or by_levels, in_registers(size, transform)
    # Few allocations: they would take a twentieth of the time.
    buffer = np.empty(group * size, np.uint8)
    scratch = np.empty(scratch_size(rule, size), np.float64)
    # Buffers for computed or padded values. Without rows, only the last bucket of all is padded.
    apart = derivative != 0 or row != 0 or in_units
    copy_bits = np.empty(group * size if apart else size, bits.dtype)
    copies = copy_bits.view(x.dtype)
    places = np.empty(4 * group if whole else 4, np.int64).reshape((4, -1))
    starts, valids, held, known = places[0], places[1], places[2], places[3]
    per_bucket = np.empty(6 * group, bits.dtype).reshape((6, group))
    floats = per_bucket.view(x.dtype)
    lows, highs, unit_bits = per_bucket[0], per_bucket[1], per_bucket[2]
    means, norms, units = floats[0], floats[1], floats[2]
    all_tops, inverses, energies = floats[3], floats[4], floats[5]
    others = np.empty(1 + (size if in_units else 1), bits.dtype)
    one_bits, one, terms = others[:1], others.view(x.dtype)[:1], others.view(x.dtype)[1:]
    drawn = np.empty(group + (size // 16 if transform else 1), np.uint32)
    random, signs = drawn[:group], drawn[group:]
    infinite = np.array([np.inf], x.dtype).view(bits.dtype)[0]
    while begin < end:
        count = min(group, end - begin)
        low, high, top = window(lows, 0, count), window(highs, 0, count), window(all_tops, 0, count)
        for i in range(count):
            kind, _ = locate(begin + i, size, n, mixed, multiplier, shift, widths)
            top[i] = number(tops[kind])
            start, most = place(begin + i, first, size, row, per_row)
            valid = min(most, x.size - start)
            if whole:
                starts[i], valids[i], held[i] = start, valid, derivative != 0 or valid < size
            if derivative != 0 or valid < size or (in_units and not whole):
                slot = i * size if apart else 0
                values, words = window(copies, slot, size), window(copy_bits, slot, size)
                source, target = window(x, start, valid), window(copies, slot, valid)
                if derivative == NORMALIZED:
                    normalize(
                        source, index + start, shifts, scales_of, inner, largest, divides, target)
                elif derivative != 0:
                    differentiate(derivative, source, target)
                else:
                    copy_bytes(source, target)
                fill = number(0) if pads_with_zero else values[valid - 1]
                for j in range(valid, size):
                    values[j] = fill
            else:
                values, words = window(x, start, size), window(bits, start, size)
            if in_units and not whole:
                peak = largest_magnitude(words)
                unit_bits[i] = peak
                inverse = unit_of(unit_bits, units, i)
                mean = enter_units(
                    values, valid, inverse, units[i], rule == _CENTRED, bf16, transform, begin + i, r0,
                    r1, signs, terms, one, one_bits)
                if peak >= infinite:
                    units[i] = np.nan
                if by_levels:
                    codes = window(buffer, i * size, size)
                    if peak >= infinite:
                        codes[:] = 0
                        norms[i] = mean = number(np.nan)
                    else:
                        scale = encode_bucket(values, widths[kind], codes, terms) * units[i]
                        one[0], word = scale, window(random, 0, 1)
                        random_words(_U((begin + i) & 0xFFFFFFFF), m0, m1, word)
                        round_at_random(one, one_bits, bf16, word)
                        norms[i] = one[0]
                    means[i] = mean
            if not by_levels and not whole:
                ranges(values, words, i, rule, low, high, norms, scratch)
        if whole:
            at, used = window(starts, 0, count), window(held, 0, count)
            peaks = window(unit_bits, 0, count)
            find_peaks(bits, copy_bits, at, used, size, peaks)
            for i in range(count):
                known[i] = peaks[i] < infinite
            rotate_group(
                x, copies, at, valids, used, size, rule == _CENTRED, bf16, transform, begin, r0, r1,
                unit_bits, units, inverses, window(means, 0, count), low, energies, signs)
            if by_levels:
                encode_group(
                    copies, size, begin, n, mixed, multiplier, shift, widths, bf16, m0, m1, units,
                    inverses, energies, window(norms, 0, count), high, terms, buffer, payload,
                    window(random, 0, count))
            for i in range(count):
                codes, values = window(buffer, i * size, size), window(copies, i * size, size)
                if not by_levels:
                    ranges(
                        values, window(copy_bits, i * size, size), i, rule, low, high, norms, scratch)
                elif known[i] == 0:
                    norms[i] = means[i] = number(np.nan)
                    kind, position = locate(begin + i, size, n, mixed, multiplier, shift, widths)
                    window(payload, position, size * widths[kind] // 8)[:] = 0
                    codes[:] = 0
                units[i] = units[i] if known[i] else number(np.nan)
        scales, offsets = high.view(x.dtype), low.view(x.dtype)
        if not by_levels:
            scales_of_ranges(rule, low, high, top, bf16, form)
        for i in range(0 if by_levels else count):
            bucket = begin + i
            start, most = place(bucket, first, size, row, per_row)
            kind, _ = locate(bucket, size, n, mixed, multiplier, shift, widths)
            scale, lo, codes = scales[i], offsets[i], window(buffer, i * size, size)
            if derivative != 0 or min(most, x.size - start) < size or in_units:
                values = window(copies, i * size if apart else 0, size)
            else:
                values = window(x, start, size)
            # Prefetch the next group: its memory is read while this group is rounded.
            ahead = start + group * size
            for j in range(ahead, min(ahead + size, x.size), line):
                prefetch(x, j)
            inverse = reciprocal(scale, x.dtype)
            if np.isnan(scale):
                codes[:] = 0
            else:
                round_codes(
                    rounding, values, codes, lo, inverse, lowests[kind], tops[kind],
                    _U((bucket * size) & 0xFFFFFFFF), k0, k1)
            if in_units:
                scales[i] = to_nearest(scale * units[i], bf16, one, one_bits)
                offsets[i] = to_nearest(lo * units[i], bf16, one, one_bits)
        # Pack in a separate loop: right after rounding, the last codes are still on their way to the
        # cache.
        for i in range(count):
            kind, position = locate(begin + i, size, n, mixed, multiplier, shift, widths)
            width = widths[kind]
            if not (whole and by_levels and packs_levels(size, width)):
                pack(window(buffer, i * size, size), width, window(payload, position, size * width // 8))
        store(metadata, begin, scales, bf16)
        if affine:
            store(metadata, n + begin, offsets, bf16)
        begin += count


@jit
def decode(
        out: Any, first: Any, begin: Any, end: Any, size: Any, n: Any, mixed: Any, multiplier: Any,
        shift: Any, widths: Any, lowests: Any, rule: Any, rounding: Any, transform: Any, keys: Any,
        bf16: Any, payload: Any, scales: Any, offsets: Any,
        limit: Any, row: Any, per_row: Any, index: Any, shifts: Any, scales_of: Any,
        inner: Any, largest: Any, divides: Any, unit_bits: Any) -> None:
    """Decodes buckets ``begin .. end - 1`` into ``out``, which starts with bucket ``first``.

    The arguments from ``row`` on are those of :func:`encode`; ``scales_of`` is empty if nothing is
    normalized. ``unit_bits`` is scratch for one integer as large as a float of ``out``.
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
    (k0, k1), (r0, r1) = keys
    by_levels = rule in (_UNBIASED, _CENTRED)
    apart = transform != 0 or by_levels or rounding in (_DITHERED, _COMPANDED)
    factors = np.empty(size if apart else 1, out.dtype)
    signs = np.empty(size // 16 if transform else 1, np.uint32)
    whole = in_registers(size, transform)
    unpacks = whole and by_levels
    unit = unit_bits.view(out.dtype)
    for bucket in range(begin, end):
        kind, position = locate(bucket, size, n, mixed, multiplier, shift, widths)
        width = widths[kind]
        packed = window(payload, position, size * width // 8)
        start, most = place(bucket, first, size, row, per_row)
        values = window(out, start, min(most, out.size - start))
        s, offset = scale[bucket - begin], lo[bucket - begin]
        if not (unpacks and packs_levels(size, width)):
            unpack(packed, width, codes)
        if not apart:
            dequantize(codes, lowests[kind], s, offset, bound, values)
        else:
            if unpacks and packs_levels(size, width):
                unpack_levels(packed, width, factors)
            elif by_levels:
                decode_levels(codes, width, factors)
            else:
                factors_of(
                    codes, lowests[kind], (1 << width) - 1, rounding,
                    _U((bucket * size) & 0xFFFFFFFF), k0, k1, factors)
                if transform:
                    s, offset = scale_in_units(factors, s, offset, unit_bits, unit), number(0)
            if whole:
                rotate_back_into(
                    factors, bucket, r0, r1, transform, signs, s, offset, bound, values)
            else:
                leave_units(
                    factors, s, offset, bound, transform, bucket, r0, r1, signs, values)
        if scales_of.size:
            denormalize(
                values, index + start, shifts, scales_of, inner, largest, divides, limit)
