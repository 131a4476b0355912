"""Floats and their bits, in Triton: loads, stores, and conversions that a device must not choose."""

# NOTE [ The device and Triton's interpreter ]
# The tests on CPU run these kernels in Triton's interpreter, which is numpy. A device may compute
# something else in some operations. The kernels rule out each of these differences:
# 1. Contraction to fused multiply-add is switched off at launch (``enable_fp_fusion`` in launch.py).
# 2. ``/`` is an approximation on float32: divisions are ``div_rn``. Subnormal numbers stay subnormal.
# 3. ``tl.minimum`` of a NaN is the other operand on a device, and NaN in numpy. Ranges use
#    ``PropagateNan.ALL``, and are reduced as sortable integers. Elsewhere, the result for a NaN is
#    replaced.
# 4. On a device, arithmetic gives NaNs other bits. Stored NaNs are written as integer constants.
# 5. The interpreter rounds to bfloat16 wrongly, so integer arithmetic does this conversion.
# 6. ``tl.floor`` flushes subnormal numbers on a device. Additions do the rounding.

# Triton's own types differ from the types that a checker infers from Python.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from brevitas_bp.kernels.gpu.constants import BF16, F16

_BF16_MIN = tl.constexpr(torch.finfo(torch.bfloat16).min)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_NAN_BITS = tl.constexpr(0x7FC00000)
_NAN_BITS_16 = tl.constexpr(0x7E00)
_F16 = tl.constexpr(F16)
_BF16 = tl.constexpr(BF16)


@triton.jit
def float_of(bits: tl.tensor) -> tl.tensor:
    """Returns the float with these bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bits_of(x: tl.tensor) -> tl.tensor:
    """Returns the bits of a float."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def load(pointer: tl.tensor, mask: tl.tensor, other: tl.tensor, float_format: tl.constexpr) -> tl.tensor:
    """Loads floats of a format as float32; bfloat16 is the upper half of a float32."""
    if float_format == _BF16:
        half = tl.load(pointer.to(tl.pointer_type(tl.int16), bitcast=True), mask)
        x = float_of(half.to(tl.int32) << 16)
    else:
        x = tl.load(pointer, mask).to(tl.float32)
    if mask is not None:
        x = tl.where(mask, x, other)
    return x


@triton.jit
def store(pointer: tl.tensor, x: tl.tensor, mask: tl.tensor, float_format: tl.constexpr) -> None:
    """Stores float32 in a format, rounded to nearest; NaN has one bit pattern."""
    nan = x != x
    if float_format == _F16:
        half = x.to(tl.float16).to(tl.int16, bitcast=True)
        half = tl.where(nan, tl.full(half.shape, _NAN_BITS_16, tl.int16), half)
        tl.store(pointer.to(tl.pointer_type(tl.int16), bitcast=True), half, mask)
    else:
        bits = bits_of(x)
        if float_format == _BF16:
            bits = bits + (((bits >> 16) & 1) + 0x7FFF)
        bits = tl.where(nan, _NAN_BITS, bits)
        if float_format == _BF16:
            half = (bits >> 16).to(tl.int16)
            tl.store(pointer.to(tl.pointer_type(tl.int16), bitcast=True), half, mask)
        else:
            tl.store(pointer.to(tl.pointer_type(tl.int32), bitcast=True), bits, mask)


@triton.jit
def key_of(x: tl.tensor) -> tl.tensor:
    """Returns the bits of a float, ordered as integers; NaN lies above infinity."""
    bits = tl.where(x != x, _NAN_BITS, bits_of(x))
    return bits ^ ((bits >> 31) & _MAGNITUDE)


@triton.jit
def from_key(key: tl.tensor) -> tl.tensor:
    """Inverts :func:`key_of`."""
    return float_of(key ^ ((key >> 31) & _MAGNITUDE))


@triton.jit
def round_down_bf16(x: tl.tensor) -> tl.tensor:
    """See ``arithmetic.round_down``."""
    bits = bits_of(x)
    truncated = bits & -65536
    further = (bits < 0) & (truncated != bits)
    return tl.maximum(float_of(tl.where(further, truncated + 65536, truncated)), _BF16_MIN)


@triton.jit
def round_half_even(x: tl.tensor) -> tl.tensor:
    """Rounds to nearest, ties to even, at any magnitude."""
    size = tl.abs(x)
    rounded = tl.where(size < 2.0**23, (size + 2.0**23) - 2.0**23, size)
    return tl.where(x < 0, -rounded, rounded)
