"""The kernels of buckets in units, in Triton: centred, rotated or coded by levels.

See ``bucket.encode_in_units``. Shapes and switches are those of
:mod:`brevitas_bp.kernels.gpu.kernels`.
"""

# Triton's own types differ from the types that a checker infers from Python.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from brevitas_bp.kernels.gpu.codes import (
    factor_of,
    load_widths,
    locate,
    pack_widths,
    round_slices,
    tops_of,
    unpack,
    word_of,
)
from brevitas_bp.kernels.gpu.constants import BF16, INF_BITS, ONE, SEVERAL
from brevitas_bp.kernels.gpu.floats import bits_of, float_of, load, store
from brevitas_bp.kernels.gpu.kernels import NUMBERS
from brevitas_bp.kernels.gpu.levels import level_of, nearest_level
from brevitas_bp.kernels.gpu.metadata import metadata_of, peak_of, reciprocal, tree_sum
from brevitas_bp.kernels.gpu.places import (
    first_units,
    limit_of,
    load_buckets,
    next_units,
    place_of,
    store_slice,
    unit_of,
)
from brevitas_bp.kernels.gpu.rotation import rotate, rotate_back, sign_words

_MAX = tl.constexpr(torch.finfo(torch.float32).max)
_BF16_MAX = tl.constexpr(torch.finfo(torch.bfloat16).max)
_INF_BITS = tl.constexpr(INF_BITS)
_NAN_BITS = tl.constexpr(0x7FC00000)
_SLICES = tl.constexpr(8)
_BF16 = tl.constexpr(BF16)
_ONE = tl.constexpr(ONE)
_SEVERAL = tl.constexpr(SEVERAL)
# Kernel arguments, see ``NUMBERS`` of the other kernels.
_NUMBERS = [*NUMBERS, "r0", "r1", "m0", "m1"]
_POINTERS = ["scales", "shifts", "table", "mix_table"]


@triton.jit
def _power_of_two(peak: tl.tensor) -> tl.tensor:
    """Returns the unit of a magnitude, given as bits, and its reciprocal: see ``arithmetic.unit_of``."""
    exponent = tl.minimum(tl.maximum(peak >> 23, 1), 253)
    return float_of(exponent << 23), float_of((254 - exponent) << 23)


@triton.jit
def _to_nearest(x: tl.tensor, bf16: tl.constexpr) -> tl.tensor:
    """See ``arithmetic.to_nearest``; ``x`` is no NaN."""
    limit: tl.constexpr = _BF16_MAX if bf16 else _MAX
    if bf16:
        bits = bits_of(x)
        x = float_of((bits + (((bits >> 16) & 1) + 0x7FFF)) & -65536)
    return tl.minimum(tl.maximum(x, -limit), limit)


@triton.jit
def _to_random(
        x: tl.tensor, bucket: tl.tensor, m0: tl.tensor, m1: tl.tensor, bf16: tl.constexpr) -> tl.tensor:
    """See ``arithmetic.to_random``; ``x`` is no NaN."""
    limit: tl.constexpr = _BF16_MAX if bf16 else _MAX
    if bf16:
        word = word_of(bucket.to(tl.uint32), m0, m1)
        x = float_of((bits_of(x) + (word & 0xFFFF).to(tl.int32)) & -65536)
    return tl.minimum(x, limit)


@triton.jit
def _scaled(xs: tl.tuple, factor: tl.tensor) -> tl.tensor:
    out = ()
    for s in tl.static_range(_SLICES):
        out = out + (xs[s] * factor[:, None],)
    return out


@triton.jit
def _scaled_and_shifted(xs: tl.tuple, factor: tl.tensor, shift: tl.tensor) -> tl.tensor:
    out = ()
    for s in tl.static_range(_SLICES):
        out = out + (xs[s] * factor[:, None] + shift[:, None],)
    return out


@triton.jit
def _products(xs: tl.tuple, ys: tl.tuple) -> tl.tensor:
    out = ()
    for s in tl.static_range(_SLICES):
        out = out + (xs[s] * ys[s],)
    return out


@triton.jit
def _centred(
        xs: tl.tuple, lane: tl.tensor, count: tl.tensor, unit: tl.tensor, inverse: tl.tensor,
        buckets: tl.constexpr, slice_size: tl.constexpr, lanes: tl.constexpr, levels: tl.constexpr,
        bf16: tl.constexpr) -> tl.tensor:
    """Subtracts the mean of the first ``count`` elements; returns the buckets and their means."""
    first = float_of(tl.sum(tl.where(lane == 0, bits_of(xs[0]), 0), axis=1))
    terms = ()
    for s in tl.static_range(_SLICES):
        inside = lane + s * slice_size < count[:, None]
        terms = terms + (tl.where(inside, xs[s] - first[:, None], 0.0),)
    total = tree_sum(terms, lane, buckets, slice_size, lanes, levels)
    mean = _to_nearest((first + tl.div_rn(total, count.to(tl.float32))) * unit, bf16)
    shift = (mean * inverse)[:, None]
    out = ()
    for s in tl.static_range(_SLICES):
        inside = lane + s * slice_size < count[:, None]
        out = out + (tl.where(inside, xs[s] - shift, 0.0),)
    return out, mean


@triton.jit
def _nearest_levels(
        xs: tl.tuple, inverse: tl.tensor, is_mixed: tl.tensor, table: tl.tensor, mix_table: tl.tensor,
        width: tl.constexpr, mix_width: tl.constexpr) -> tl.tensor:
    """Returns the codes of all slices, and what they stand for."""
    codes, levels = (), ()
    for s in tl.static_range(_SLICES):
        u = xs[s] * inverse[:, None]
        code, level = nearest_level(u, table, width)
        if mix_width > 0:
            other = is_mixed[:, None]
            mix_code, mix_level = nearest_level(u, mix_table, mix_width)
            code, level = tl.where(other, mix_code, code), tl.where(other, mix_level, level)
        codes, levels = codes + (code,), levels + (level,)
    return codes, levels


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def encode_in_units_kernel(
        x: tl.tensor, payload: tl.tensor, metadata: tl.tensor, numel: tl.int64,
        n: tl.int64, mixed: tl.int64, multiplier: tl.int64, shift: tl.int64, k0: tl.int32,
        k1: tl.int32, row: tl.int64, scales: tl.tensor, shifts: tl.tensor, inner: tl.int64,
        kinds: tl.int64, r0: tl.int32, r1: tl.int32, m0: tl.int32, m1: tl.int32, table: tl.tensor,
        mix_table: tl.tensor, size: tl.constexpr, buckets: tl.constexpr, lanes: tl.constexpr,
        levels: tl.constexpr, width: tl.constexpr, mix_width: tl.constexpr, top: tl.constexpr,
        mix_top: tl.constexpr, signed: tl.constexpr, affine: tl.constexpr,
        pads_with_zero: tl.constexpr, rule: tl.constexpr, form: tl.constexpr,
        rounding: tl.constexpr, rotations: tl.constexpr, centres: tl.constexpr,
        by_levels: tl.constexpr, rows: tl.constexpr, units: tl.constexpr, float_format: tl.constexpr,
        metadata_format: tl.constexpr) -> None:
    """Encodes ``buckets`` buckets; ``mix_width`` is 0 if all have one width."""
    slice_size: tl.constexpr = size // 8
    padded: tl.constexpr = slice_size != lanes
    bf16: tl.constexpr = metadata_format == _BF16
    numel, n, mixed = numel.to(tl.int64), n.to(tl.int64), mixed.to(tl.int64)
    row, inner, kinds = row.to(tl.int64), inner.to(tl.int64), kinds.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * buckets
    number = tl.arange(0, buckets)
    lane = tl.arange(0, lanes)[None, :]
    bucket = first + number
    is_mixed, start = locate(
        bucket, n, mixed, multiplier.to(tl.int64), shift.to(tl.int64), size, width, mix_width)
    place, distance, end = place_of(first, number, n, row, size, buckets, rows)
    far, kind = first_units(
        place, distance + lane if units == _SEVERAL else distance, inner, kinds, units)
    limit = limit_of(place, end, numel, size, buckets, rows)
    xs = load_buckets(
        x + place, distance + lane, lane, place, limit, numel, far, kind, scales, shifts, inner, kinds,
        pads_with_zero, float_format, size, buckets, slice_size, rows, units, padded)

    peak = peak_of(xs, lane, slice_size)
    broken = peak >= _INF_BITS
    unit, inverse = _power_of_two(peak)
    xs = _scaled(xs, inverse)
    if centres:
        # Buckets that do not exist have one element.
        count = tl.minimum(tl.maximum(tl.reshape(limit - distance, [buckets]), 1), size)
        xs, offset = _centred(
            xs, lane, count, unit, inverse, buckets, slice_size, lanes, levels, bf16)
    if rotations > 0:
        words = sign_words(bucket, lane, r0, r1, size)
        xs = rotate(xs, words, lane, rotations, size, buckets, lanes, levels)
    if by_levels:
        total = tree_sum(_products(xs, xs), lane, buckets, slice_size, lanes, levels)
        # The float32 root equals the rounded float64 root.
        spread = tl.sqrt_rn(total * (1 / size))
        codes, nearest = _nearest_levels(
            xs, reciprocal(spread), is_mixed, table, mix_table, width, mix_width)
        along = tree_sum(_products(xs, nearest), lane, buckets, slice_size, lanes, levels)
        known = along > 0
        scale = tl.where(known, tl.div_rn(total, tl.where(known, along, 1.0)), 0.0)
        scale = _to_random(scale * unit, bucket, m0, m1, bf16)
    else:
        tops = tl.where(is_mixed, mix_top, top).to(tl.float32)
        scale, inverse, lo, _ = metadata_of(
            xs, lane, tops, buckets, slice_size, lanes, levels, rule, form, bf16)
        index = (bucket * size).to(tl.uint32)[:, None] + lane.to(tl.uint32)
        codes = round_slices(
            xs, lo, inverse, tops, index, k0, k1, signed, affine, rounding, slice_size)
        scale, offset = _to_nearest(scale * unit, bf16), _to_nearest(lo * unit, bf16)

    exists = bucket < n
    nan = float_of(tl.full([buckets], _NAN_BITS, tl.int32))
    store(metadata + bucket, tl.where(broken, nan, scale), exists, metadata_format)
    if affine:
        store(metadata + n + bucket, tl.where(broken, nan, offset), exists, metadata_format)
    pack_widths(
        codes, payload + start[:, None] + lane, is_mixed, broken, exists[:, None] & (lane < slice_size),
        width, mix_width, slice_size)


@triton.jit
def _factors(
        lines: tl.tuple, mix_lines: tl.tuple, is_mixed: tl.tensor, lowest: tl.tensor,
        index: tl.tensor, k0: tl.tensor, k1: tl.tensor, table: tl.tensor, mix_table: tl.tensor,
        width: tl.constexpr, mix_width: tl.constexpr, rounding: tl.constexpr, by_levels: tl.constexpr,
        slice_size: tl.constexpr) -> tl.tensor:
    """Returns what the codes of all slices stand for."""
    out, top = (), tops_of(is_mixed, width, mix_width)
    for s in tl.static_range(_SLICES):
        code = unpack(lines, s, width)
        if by_levels:
            factor = level_of(code, table, width)
            if mix_width > 0:
                mix_factor = level_of(unpack(mix_lines, s, mix_width), mix_table, mix_width)
                factor = tl.where(is_mixed[:, None], mix_factor, factor)
        else:
            if mix_width > 0:
                # The lines of the other width are zero.
                code = code | unpack(mix_lines, s, mix_width)
            factor = factor_of(code + lowest, top, index + s * slice_size, k0, k1, rounding)
        out = out + (factor,)
    return out


@triton.jit
def _store_slices(
        out: tl.tensor, ys: tl.tuple, scale: tl.tensor, lo: tl.tensor, inside: tl.tensor,
        lane: tl.tensor, limit: tl.tensor, far: tl.tensor, kind: tl.tensor, scales: tl.tensor,
        shifts: tl.tensor, inner: tl.tensor, kinds: tl.tensor, largest: tl.constexpr,
        float_format: tl.constexpr, slice_size: tl.constexpr, units: tl.constexpr,
        padded: tl.constexpr, tail: tl.constexpr) -> None:
    unit, moved = 0.0, 0.0
    if units == _ONE:
        unit, moved = unit_of(kind, scales, shifts)
    for s in tl.static_range(_SLICES):
        if units == _SEVERAL:
            if s > 0:
                far, kind = next_units(far, kind, inner, kinds, slice_size)
            unit, moved = unit_of(kind, scales, shifts)
        store_slice(
            out, ys[s] * scale + lo, inside + s * slice_size, lane, limit, unit, moved, shifts, largest,
            float_format, slice_size, units, padded, tail)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def decode_in_units_kernel(
        out: tl.tensor, payload: tl.tensor, metadata: tl.tensor, numel: tl.int64,
        n: tl.int64, mixed: tl.int64, multiplier: tl.int64, shift: tl.int64, k0: tl.int32,
        k1: tl.int32, row: tl.int64, scales: tl.tensor, shifts: tl.tensor, inner: tl.int64,
        kinds: tl.int64, r0: tl.int32, r1: tl.int32, table: tl.tensor, mix_table: tl.tensor,
        size: tl.constexpr, buckets: tl.constexpr, lanes: tl.constexpr, levels: tl.constexpr,
        width: tl.constexpr, mix_width: tl.constexpr, lowest: tl.constexpr, mix_lowest: tl.constexpr,
        affine: tl.constexpr, rounding: tl.constexpr, rotations: tl.constexpr,
        by_levels: tl.constexpr, largest: tl.constexpr, rows: tl.constexpr, units: tl.constexpr,
        float_format: tl.constexpr, metadata_format: tl.constexpr) -> None:
    """Decodes ``buckets`` buckets; ``mix_width`` is 0 if all have one width."""
    slice_size: tl.constexpr = size // 8
    padded: tl.constexpr = slice_size != lanes
    numel, n, mixed = numel.to(tl.int64), n.to(tl.int64), mixed.to(tl.int64)
    row, inner, kinds = row.to(tl.int64), inner.to(tl.int64), kinds.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * buckets
    number = tl.arange(0, buckets)
    lane = tl.arange(0, lanes)[None, :]
    bucket = first + number
    is_mixed, start = locate(
        bucket, n, mixed, multiplier.to(tl.int64), shift.to(tl.int64), size, width, mix_width)
    exists = bucket < n
    scale = load(metadata + bucket, exists, 0.0, metadata_format)
    lo = tl.zeros([buckets], tl.float32)
    if affine:
        lo = load(metadata + n + bucket, exists, 0.0, metadata_format)
    lines, mix_lines = load_widths(
        payload + start[:, None] + lane, is_mixed, exists[:, None] & (lane < slice_size), width,
        mix_width, slice_size)
    low = tl.where(is_mixed, mix_lowest, lowest)[:, None]
    index = (bucket * size).to(tl.uint32)[:, None] + lane.to(tl.uint32)
    ys = _factors(
        lines, mix_lines, is_mixed, low, index, k0, k1, table, mix_table, width, mix_width, rounding,
        by_levels, slice_size)
    if not by_levels:
        # A NaN scale gives NaN with any unit.
        peak = tl.maximum(bits_of(tl.abs(scale)), bits_of(tl.abs(lo)))
        unit, inverse = _power_of_two(peak)
        ys = _scaled_and_shifted(ys, scale * inverse, lo * inverse)
        scale, lo = unit, tl.zeros([buckets], tl.float32)
    if rotations > 0:
        words = sign_words(bucket, lane, r0, r1, size)
        ys = rotate_back(ys, words, lane, rotations, size, buckets, lanes, levels)

    place, distance, end = place_of(first, number, n, row, size, buckets, rows)
    inside = distance + lane
    far, kind = first_units(
        place, inside if units == _SEVERAL else distance, inner, kinds, units)
    whole = place + buckets * size <= numel
    if rows:
        whole = False
    if whole:
        _store_slices(
            out + place, ys, scale[:, None], lo[:, None], inside, lane, 0, far, kind, scales, shifts,
            inner, kinds, largest, float_format, slice_size, units, padded, False)
    else:
        limit = tl.where(exists[:, None], end, 0) if rows else (numel - place).to(tl.int32)
        _store_slices(
            out + place, ys, scale[:, None], lo[:, None], inside, lane, limit, far, kind, scales,
            shifts, inner, kinds, largest, float_format, slice_size, units, padded, True)
