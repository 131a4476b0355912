"""Computes noise and packing, in Triton: see ``random`` and ``packing`` of :mod:`brevitas_bp.format`."""

# Triton's own types differ from the types that a checker infers from Python.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

from brevitas_bp.format.random import HASH_LAST_SHIFT, HASH_ROUNDS, NOISE_BITS, NOISE_STEP
from brevitas_bp.format.stages import COMPANDED, DITHERED, NEAREST, STOCHASTIC
from brevitas_bp.kernels.gpu.floats import bits_of

_S0, _M0 = tl.constexpr(HASH_ROUNDS[0][0]), tl.constexpr(HASH_ROUNDS[0][1])
_S1, _M1 = tl.constexpr(HASH_ROUNDS[1][0]), tl.constexpr(HASH_ROUNDS[1][1])
_S2, _M2 = tl.constexpr(HASH_ROUNDS[2][0]), tl.constexpr(HASH_ROUNDS[2][1])
_S3 = tl.constexpr(HASH_LAST_SHIFT)
#: The roundings that :func:`round_codes` and :func:`factor_of` implement.
ROUNDINGS = frozenset({NEAREST, STOCHASTIC, DITHERED, COMPANDED})
_STOCHASTIC = tl.constexpr(STOCHASTIC.number)
_DITHERED = tl.constexpr(DITHERED.number)
_COMPANDED = tl.constexpr(COMPANDED.number)
# Adding this to a float of less than 2**22 rounds the float to the nearest integer, ties to even. The
# low bits then hold this integer. Conversion instructions run at a fraction of the rate of additions.
_MAGIC = tl.constexpr(1.5 * 2**23)
_MAGIC_BITS = tl.constexpr(0x4B400000)
_TO_NOISE = tl.constexpr(32 - NOISE_BITS)
_STEP = tl.constexpr(NOISE_STEP)
_SLICES = tl.constexpr(8)


@triton.jit
def word_of(index: tl.tensor, k0: tl.tensor, k1: tl.tensor) -> tl.tensor:
    """See ``random.words_``; ``index`` is uint32, and so is the result."""
    h = index + k0.to(tl.uint32)
    h = (h ^ (h >> _S0)) * _M0
    h = h ^ k1.to(tl.uint32)
    h = (h ^ (h >> _S1)) * _M1
    h = (h ^ (h >> _S2)) * _M2
    return h ^ (h >> _S3)


@triton.jit
def noise_of(index: tl.tensor, k0: tl.tensor, k1: tl.tensor) -> tl.tensor:
    """See ``random.uniform_``; ``index`` is uint32."""
    return (word_of(index, k0, k1) >> _TO_NOISE).to(tl.int32).to(tl.float32) * _STEP


@triton.jit
def _between_levels(
        u: tl.tensor, high: tl.tensor, index: tl.tensor, k0: tl.tensor, k1: tl.tensor) -> tl.tensor:
    """See ``stages.COMPANDED``; ``u`` is in [0, ``high``]."""
    part = tl.div_rn(tl.zeros_like(high) + 1.0, high)
    root = tl.sqrt_rn(u * high)
    nearest = (root + _MAGIC) - _MAGIC
    k = tl.where(nearest > root, nearest - 1.0, nearest)
    # The root is off by less than a level. Comparisons with the levels themselves decide.
    k = tl.maximum(k - ((k * k) * part > u).to(tl.float32), 0.0)
    above = k + 1.0
    k = tl.minimum(tl.where((above * above) * part <= u, above, k), high - 1.0)
    above = k + 1.0
    low = (k * k) * part
    step = (above * above) * part - low
    return tl.where(noise_of(index, k0, k1) < tl.div_rn(u - low, step), above, k).to(tl.int32)


@triton.jit
def round_codes(
        u: tl.tensor, high: tl.tensor, index: tl.tensor, k0: tl.tensor, k1: tl.tensor,
        rounding: tl.constexpr) -> tl.tensor:
    """Integers of ``u``, whose magnitude is below 2**22, by the rounding of this number, int32.

    ``u`` is clamped to the range of the codes, which ends with ``high``. ``index`` holds the flat
    indices of the elements, uint32.
    """
    if rounding == _COMPANDED:
        return _between_levels(u, high, index, k0, k1)
    if rounding == _DITHERED:
        # The sum of ``high`` and noise may round up to the next integer.
        u = tl.minimum(u + noise_of(index, k0, k1), high)
    shifted = u + _MAGIC
    code = bits_of(shifted) - _MAGIC_BITS
    if rounding == _DITHERED:
        code = code - (shifted - _MAGIC > u).to(tl.int32)
    if rounding == _STOCHASTIC:
        nearest = shifted - _MAGIC
        above = nearest > u
        floor = tl.where(above, nearest - 1.0, nearest)
        noise = noise_of(index, k0, k1)
        code = code - above.to(tl.int32) + (noise < u - floor).to(tl.int32)
    return code


@triton.jit
def factor_of(
        code: tl.tensor, high: tl.tensor, index: tl.tensor, k0: tl.tensor, k1: tl.tensor,
        rounding: tl.constexpr) -> tl.tensor:
    """Returns what integers of :func:`round_codes` stand for, in steps; ``high`` is the top code."""
    factor = code.to(tl.float32)
    if rounding == _COMPANDED:
        factor = (factor * factor) * tl.div_rn(tl.zeros_like(high) + 1.0, high)
    if rounding == _DITHERED:
        factor = (factor + 0.5) - noise_of(index, k0, k1)
    return factor


@triton.jit
def tops_of(is_mixed: tl.tensor, width: tl.constexpr, mix_width: tl.constexpr) -> tl.tensor:
    """Returns the top codes of unsigned codes, one for each bucket."""
    return tl.where(is_mixed, (1 << mix_width) - 1, (1 << width) - 1).to(tl.float32)[:, None]


@triton.jit
def locate(
        bucket: tl.tensor, n: tl.tensor, mixed: tl.tensor, multiplier: tl.tensor, shift: tl.tensor,
        size: tl.constexpr, width: tl.constexpr, mix_width: tl.constexpr) -> tl.tensor:
    """Returns which buckets have the second width, and where the bytes of each begin."""
    nbytes: tl.constexpr = size * width // 8
    if mix_width == 0:
        is_mixed, start = bucket < 0, bucket * nbytes
    else:
        mix_nbytes: tl.constexpr = size * mix_width // 8
        slot = (multiplier * bucket + shift) % n
        is_mixed = slot < mixed
        start = tl.where(
            is_mixed, slot * mix_nbytes, mixed * mix_nbytes + (slot - mixed) * nbytes)
    return is_mixed, start


@triton.jit
def round_slices(
        xs: tl.tuple, lo: tl.tensor, inverse: tl.tensor, tops: tl.tensor, index: tl.tensor,
        k0: tl.tensor, k1: tl.tensor, signed: tl.constexpr, affine: tl.constexpr,
        rounding: tl.constexpr, slice_size: tl.constexpr) -> tl.tensor:
    """Returns the codes of all slices, counted from the lowest; ``index`` is that of the first slice."""
    high = tops[:, None]
    low = -high if signed else high * 0.0
    lowest = low.to(tl.int32)
    codes = ()
    for s in tl.static_range(_SLICES):
        u = xs[s]
        if affine:
            u = u - lo[:, None]
        # The ends are integers, so clamping first gives the same codes as clamping last.
        u = tl.minimum(tl.maximum(u * inverse[:, None], low), high)
        code = round_codes(u, high, index + s * slice_size, k0, k1, rounding) - lowest
        codes = codes + (code,)
    return codes


@triton.jit
def _pack_plane(
        codes: tl.tuple, pointer: tl.tensor, broken: tl.tensor, mask: tl.tensor, bits: tl.constexpr,
        first: tl.constexpr, slice_size: tl.constexpr) -> None:
    for t in tl.static_range(bits):
        byte = (codes[t] >> first) & ((1 << bits) - 1)
        for i in tl.static_range(1, 8 // bits):
            byte = byte | (((codes[t + i * bits] >> first) & ((1 << bits) - 1)) << (bits * i))
        byte = tl.where(broken, 0, byte).to(tl.uint8)
        tl.store(pointer + (first + t) * slice_size, byte, mask)


@triton.jit
def pack(
        codes: tl.tuple, pointer: tl.tensor, broken: tl.tensor, mask: tl.tensor,
        width: tl.constexpr, slice_size: tl.constexpr) -> None:
    """Stores the planes of all buckets; ``pointer`` is at byte ``lane`` of each."""
    for p in tl.static_range(4):
        if width & (8 >> p):
            _pack_plane(
                codes, pointer, broken, mask, 8 >> p, width & -(16 >> p), slice_size)


@triton.jit
def pack_widths(
        codes: tl.tuple, pointer: tl.tensor, is_mixed: tl.tensor, broken: tl.tensor, mask: tl.tensor,
        width: tl.constexpr, mix_width: tl.constexpr, slice_size: tl.constexpr) -> None:
    """Stores the planes of buckets, which have one of two widths; broken buckets store zeros."""
    if mix_width == 0:
        pack(codes, pointer, broken[:, None], mask, width, slice_size)
    else:
        other = is_mixed[:, None]
        pack(codes, pointer, broken[:, None], mask & (other == 0), width, slice_size)
        pack(codes, pointer, broken[:, None], mask & other, mix_width, slice_size)


@triton.jit
def load_planes(
        pointer: tl.tensor, mask: tl.tensor, width: tl.constexpr,
        slice_size: tl.constexpr) -> tl.tensor:
    """Loads the ``width`` lines of ``slice_size`` bytes of each bucket, as integers."""
    out = ()
    for t in tl.static_range(width):
        out = out + (tl.load(pointer + t * slice_size, mask, 0).to(tl.int32),)
    return out


@triton.jit
def load_widths(
        pointer: tl.tensor, is_mixed: tl.tensor, mask: tl.tensor, width: tl.constexpr,
        mix_width: tl.constexpr, slice_size: tl.constexpr) -> tl.tensor:
    """Loads the lines of each width; those of the width that a bucket does not have are zero."""
    if mix_width == 0:
        lines = load_planes(pointer, mask, width, slice_size)
        mix_lines = ()
    else:
        other = is_mixed[:, None]
        lines = load_planes(pointer, mask & (other == 0), width, slice_size)
        mix_lines = load_planes(pointer, mask & other, mix_width, slice_size)
    return lines, mix_lines


@triton.jit
def _unpack_plane(
        lines: tl.tuple, s: tl.constexpr, bits: tl.constexpr, first: tl.constexpr) -> tl.tensor:
    part = lines[first + s % bits] >> (bits * (s // bits))
    return (part & ((1 << bits) - 1)) << first


@triton.jit
def unpack(lines: tl.tuple, s: tl.constexpr, width: tl.constexpr) -> tl.tensor:
    """Returns the codes of slice ``s``."""
    code = tl.zeros_like(lines[0])
    for p in tl.static_range(4):
        if width & (8 >> p):
            code = code | _unpack_plane(lines, s, 8 >> p, width & -(16 >> p))
    return code
