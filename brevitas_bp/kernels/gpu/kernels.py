"""The Triton functions of :mod:`brevitas_bp.kernels.gpu.launch`: a program handles a few buckets.

Shapes:

* [buckets] for a value that each bucket has once.
* [buckets, lanes] for a slice of each bucket. Lanes are the elements of a slice, padded to a power of
  two.
* Tuples hold the eight slices of each bucket, or the lines of bytes that a width needs. A line has as
  many bytes as a slice has elements.

Two switches of a kernel cost nothing if they are off:

* ``rows``: buckets end with rows of ``row`` elements, which they do not fill.
* ``units``: values are normalized, with one or several statistics in a bucket. There are ``kinds``
  statistics, with ``scales`` and ``shifts``.
"""

# Triton's own types differ from the types that a checker infers from Python.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

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
)
from brevitas_bp.kernels.gpu.constants import BF16, ONE, SEVERAL
from brevitas_bp.kernels.gpu.floats import load, store
from brevitas_bp.kernels.gpu.metadata import metadata_of
from brevitas_bp.kernels.gpu.places import (
    first_units,
    limit_of,
    load_buckets,
    next_units,
    place_of,
    store_slice,
    unit_of,
)

_SLICES = tl.constexpr(8)
_BF16 = tl.constexpr(BF16)
_ONE = tl.constexpr(ONE)
_SEVERAL = tl.constexpr(SEVERAL)
# Arguments for which Triton does not compile a kernel for each kind of value.
NUMBERS = ["numel", "n", "mixed", "multiplier", "shift", "row", "inner", "kinds", "k0", "k1"]


@triton.jit(
    do_not_specialize=NUMBERS, do_not_specialize_on_alignment=["scales", "shifts"])
def encode_kernel(
        x: tl.tensor, payload: tl.tensor, metadata: tl.tensor, numel: tl.int64,
        n: tl.int64, mixed: tl.int64, multiplier: tl.int64, shift: tl.int64, k0: tl.int32,
        k1: tl.int32, row: tl.int64, scales: tl.tensor, shifts: tl.tensor, inner: tl.int64,
        kinds: tl.int64, size: tl.constexpr, buckets: tl.constexpr, lanes: tl.constexpr,
        levels: tl.constexpr, width: tl.constexpr, mix_width: tl.constexpr, top: tl.constexpr,
        mix_top: tl.constexpr, signed: tl.constexpr, affine: tl.constexpr,
        pads_with_zero: tl.constexpr, rule: tl.constexpr, form: tl.constexpr,
        rounding: tl.constexpr, rows: tl.constexpr, units: tl.constexpr, float_format: tl.constexpr,
        metadata_format: tl.constexpr) -> None:
    """Encodes ``buckets`` buckets; ``mix_width`` is 0 if all have one width."""
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
    # Offsets within the program are 32 bits wide; its place in the tensor is 64 bits wide.
    place, distance, end = place_of(first, number, n, row, size, buckets, rows)
    here, inside = x + place, distance + lane
    far, kind = first_units(
        place, inside if units == _SEVERAL else distance, inner, kinds, units)
    limit = limit_of(place, end, numel, size, buckets, rows)
    xs = load_buckets(
        here, inside, lane, place, limit, numel, far, kind, scales, shifts, inner, kinds,
        pads_with_zero, float_format, size, buckets, slice_size, rows, units, padded)

    tops = tl.where(is_mixed, mix_top, top).to(tl.float32)
    scale, inverse, lo, broken = metadata_of(
        xs, lane, tops, buckets, slice_size, lanes, levels, rule, form, metadata_format == _BF16)
    exists = bucket < n
    store(metadata + bucket, scale, exists, metadata_format)
    if affine:
        store(metadata + n + bucket, lo, exists, metadata_format)

    index = (bucket * size).to(tl.uint32)[:, None] + lane.to(tl.uint32)
    codes = round_slices(
        xs, lo, inverse, tops, index, k0, k1, signed, affine, rounding, slice_size)
    pack_widths(
        codes, payload + start[:, None] + lane, is_mixed, broken, exists[:, None] & (lane < slice_size),
        width, mix_width, slice_size)


@triton.jit
def _decode_slices(
        out: tl.tensor, lines: tl.tuple, mix_lines: tl.tuple, lowest: tl.tensor, top: tl.tensor,
        scale: tl.tensor, lo: tl.tensor, index: tl.tensor, k0: tl.tensor, k1: tl.tensor,
        inside: tl.tensor, lane: tl.tensor, limit: tl.tensor, far: tl.tensor, kind: tl.tensor,
        scales: tl.tensor, shifts: tl.tensor, inner: tl.tensor, kinds: tl.tensor, largest: tl.constexpr,
        width: tl.constexpr, mix_width: tl.constexpr, float_format: tl.constexpr,
        slice_size: tl.constexpr, rounding: tl.constexpr, units: tl.constexpr, padded: tl.constexpr,
        tail: tl.constexpr) -> None:
    unit, moved = 0.0, 0.0
    if units == _ONE:
        unit, moved = unit_of(kind, scales, shifts)
    for s in tl.static_range(_SLICES):
        code = unpack(lines, s, width)
        if mix_width > 0:
            # The lines of the other width are zero.
            code = code | unpack(mix_lines, s, mix_width)
        factor = factor_of(code + lowest, top, index + s * slice_size, k0, k1, rounding)
        if units == _SEVERAL:
            if s > 0:
                far, kind = next_units(far, kind, inner, kinds, slice_size)
            unit, moved = unit_of(kind, scales, shifts)
        store_slice(
            out, factor * scale + lo, inside + s * slice_size, lane, limit, unit, moved, shifts,
            largest, float_format, slice_size, units, padded, tail)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=["scales", "shifts"])
def decode_kernel(
        out: tl.tensor, payload: tl.tensor, metadata: tl.tensor, numel: tl.int64,
        n: tl.int64, mixed: tl.int64, multiplier: tl.int64, shift: tl.int64, k0: tl.int32,
        k1: tl.int32, row: tl.int64, scales: tl.tensor, shifts: tl.tensor, inner: tl.int64,
        kinds: tl.int64, size: tl.constexpr, buckets: tl.constexpr, lanes: tl.constexpr,
        width: tl.constexpr, mix_width: tl.constexpr, lowest: tl.constexpr, mix_lowest: tl.constexpr,
        affine: tl.constexpr, rounding: tl.constexpr, largest: tl.constexpr, rows: tl.constexpr,
        units: tl.constexpr, float_format: tl.constexpr, metadata_format: tl.constexpr) -> None:
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
    scale = load(metadata + bucket, exists, 0.0, metadata_format)[:, None]
    if affine:
        lo = load(metadata + n + bucket, exists, 0.0, metadata_format)[:, None]
    else:
        lo = 0.0
    pointer = payload + start[:, None] + lane
    mask = exists[:, None] & (lane < slice_size)
    lines, mix_lines = load_widths(pointer, is_mixed, mask, width, mix_width, slice_size)
    index = (bucket * size).to(tl.uint32)[:, None] + lane.to(tl.uint32)
    low = tl.where(is_mixed, mix_lowest, lowest)[:, None]
    top = tops_of(is_mixed, width, mix_width)
    place, distance, end = place_of(first, number, n, row, size, buckets, rows)
    here, inside = out + place, distance + lane
    far, kind = first_units(
        place, inside if units == _SEVERAL else distance, inner, kinds, units)
    whole = place + buckets * size <= numel
    if rows:
        whole = False
    if whole:
        _decode_slices(
            here, lines, mix_lines, low, top, scale, lo, index, k0, k1, inside, lane, 0, far, kind,
            scales, shifts, inner, kinds, largest, width, mix_width, float_format, slice_size, rounding,
            units, padded, False)
    else:
        limit = tl.where(exists[:, None], end, 0) if rows else (numel - place).to(tl.int32)
        _decode_slices(
            here, lines, mix_lines, low, top, scale, lo, index, k0, k1, inside, lane, limit, far, kind,
            scales, shifts, inner, kinds, largest, width, mix_width, float_format, slice_size, rounding,
            units, padded, True)
