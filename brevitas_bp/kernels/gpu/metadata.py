"""Computes scale and offset of buckets, in Triton: see :mod:`brevitas_bp.format.stages`."""

# Triton's own types differ from the types that a checker infers from Python.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from brevitas_bp.format.arithmetic import LARGEST_END, RANGE_LIMIT
from brevitas_bp.format.stages import L2, MAX, MIN_MAX, ZERO_IN_RANGE
from brevitas_bp.kernels.gpu.constants import INF_BITS
from brevitas_bp.kernels.gpu.floats import (
    float_of,
    from_key,
    key_of,
    round_down_bf16,
    round_half_even,
)

_LIMIT = tl.constexpr(torch.finfo(torch.float32).max * RANGE_LIMIT)
_LARGEST_END = tl.constexpr(torch.finfo(torch.float32).max * LARGEST_END)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_SIGN = tl.constexpr(-(1 << 31))
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_INF_BITS = tl.constexpr(INF_BITS)
_NAN_BITS = tl.constexpr(0x7FC00000)
_SLICES = tl.constexpr(8)
#: The scale rules that :func:`metadata_of` implements.
RULES = frozenset({MIN_MAX, MAX, L2, ZERO_IN_RANGE})
_MIN_MAX = tl.constexpr(MIN_MAX.number)
_L2 = tl.constexpr(L2.number)


@triton.jit
def _add_upper_half(
        total: tl.tensor, lane: tl.tensor, left: tl.constexpr, buckets: tl.constexpr,
        lanes: tl.constexpr) -> tl.tensor:
    """Adds the upper half of the first ``left`` columns to the lower half, which is the longer one."""
    partner = lane + (left + 1) // 2
    index = tl.broadcast_to(tl.minimum(partner, lanes - 1), [buckets, lanes])
    return total + tl.where(partner < left, tl.gather(total, index, axis=1), 0.0)


@triton.jit
def _squares(xs: tl.tuple) -> tl.tuple:
    out = ()
    for s in tl.static_range(_SLICES):
        x = xs[s].to(tl.float64)
        out = out + (x * x,)
    return out


@triton.jit
def tree_sum(
        terms: tl.tuple, lane: tl.tensor, buckets: tl.constexpr, slice_size: tl.constexpr,
        lanes: tl.constexpr, levels: tl.constexpr) -> tl.tensor:
    """Returns the sums [buckets] of eight slices, by the binary tree of ``arithmetic.tree_sum``."""
    # The first three halvings add whole slices.
    a0 = (terms[0] + terms[4]) + (terms[2] + terms[6])
    a1 = (terms[1] + terms[5]) + (terms[3] + terms[7])
    total = a0 + a1
    if slice_size == lanes:
        for level in tl.static_range(levels):
            total = tl.sum(tl.reshape(total, [buckets, 2, lanes >> (level + 1)]), axis=1)
        total = tl.reshape(total, [buckets])
    else:
        for level in tl.static_range(levels):
            # ceil(slice_size / 2**level) sums are left.
            total = _add_upper_half(
                total, lane, (slice_size + (1 << level) - 1) >> level, buckets, lanes)
        total = tl.sum(tl.where(lane == 0, total, 0.0), axis=1)
    return total


@triton.jit
def peak_of(xs: tl.tuple, lane: tl.tensor, slice_size: tl.constexpr) -> tl.tensor:
    """Returns the bits of the largest magnitude [buckets]; those of a NaN if there is one."""
    peak = tl.abs(xs[0])
    for s in tl.static_range(1, _SLICES):
        peak = tl.maximum(peak, tl.abs(xs[s]), propagate_nan=tl.PropagateNan.ALL)
    return tl.max(tl.where(lane < slice_size, key_of(peak), 0), axis=1)


@triton.jit
def reciprocal(scale: tl.tensor) -> tl.tensor:
    """See ``arithmetic.reciprocal``."""
    usable = scale >= _TINY
    return tl.where(usable, tl.div_rn(1.0, tl.where(usable, scale, 1.0)), 0.0)


@triton.jit
def _zero_in_range(lo: tl.tensor, hi: tl.tensor, top: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Returns scale and offset: see ``arithmetic.zero_in_range``."""
    low = tl.minimum(tl.maximum(-lo, 0.0), _LARGEST_END) + 0.0
    high = tl.minimum(tl.maximum(hi, 0.0), _LARGEST_END) + 0.0
    below = tl.div_rn(low, top)
    # Truncation is the floor here. Rounding instructions of floats would flush subnormal numbers.
    zero = (below * reciprocal(below + tl.div_rn(high, top)) * top).to(tl.int32).to(tl.float32)
    zero = tl.minimum(tl.maximum(zero, 1.0), top - 1.0)
    zero = tl.where(low == 0, 0.0, tl.where(high == 0, top, zero))
    scale = tl.maximum(
        tl.div_rn(low, tl.maximum(zero, 1.0)), tl.div_rn(high, tl.maximum(top - zero, 1.0)))
    return scale, tl.where(scale >= _TINY, -zero * scale + 0.0, 0.0)


@triton.jit
def metadata_of(
        xs: tl.tuple, lane: tl.tensor, top: tl.tensor, buckets: tl.constexpr,
        slice_size: tl.constexpr, lanes: tl.constexpr, levels: tl.constexpr, rule: tl.constexpr,
        form: tl.constexpr, bf16: tl.constexpr) -> tl.tensor:
    """Returns scale, its reciprocal, offset, and whether a bucket holds NaN or Inf, each [buckets]."""
    if rule == _MIN_MAX:
        low, high = xs[0], xs[0]
        for s in tl.static_range(1, _SLICES):
            low = tl.minimum(low, xs[s], propagate_nan=tl.PropagateNan.ALL)
            high = tl.maximum(high, xs[s], propagate_nan=tl.PropagateNan.ALL)
        # A NaN is in both ``low`` and ``high``, and lies above every number.
        low_key = tl.min(tl.where(lane < slice_size, key_of(low), _MAGNITUDE), axis=1)
        high_key = tl.max(tl.where(lane < slice_size, key_of(high), _SIGN), axis=1)
        broken = (low_key <= ~_INF_BITS) | (high_key >= _INF_BITS)
        lo = from_key(low_key) + 0.0
        hi = from_key(high_key) + 0.0
        if bf16:
            lo = round_down_bf16(lo)
        reach = hi - lo
    else:
        peak_key = peak_of(xs, lane, slice_size)
        broken = peak_key >= _INF_BITS
        lo = tl.zeros([buckets], tl.float32)
        hi = lo
        if rule == _L2:
            total = tree_sum(_squares(xs), lane, buckets, slice_size, lanes, levels)
            reach = tl.sqrt(total).to(tl.float32)
        else:
            reach = from_key(peak_key)
    if form == 2:
        scale, lo = _zero_in_range(lo, hi, top)
    else:
        scale = tl.div_rn(tl.minimum(reach, _LIMIT), top)
    if bf16:
        scale = -round_down_bf16(-scale)
    inverse = reciprocal(scale)
    if form == 1:
        rounded = -round_half_even(-lo * inverse)
        lo = tl.where(inverse > 0, rounded * scale + 0.0, lo)
    nan = float_of(tl.full([buckets], _NAN_BITS, tl.int32))
    return tl.where(broken, nan, scale), inverse, tl.where(broken, nan, lo), broken
