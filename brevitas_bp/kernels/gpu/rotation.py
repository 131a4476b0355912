"""Random rotations of buckets, in Triton: see :mod:`brevitas_bp.format.rotation`.

Slices of a bucket that can be rotated have a power of two of elements, so lanes are never padded.
"""

# Triton's own types differ from the types that a checker infers from Python.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

from brevitas_bp.format.rotation import GROUP
from brevitas_bp.format.stages import NO_TRANSFORM, ROTATED, ROTATED_TWICE
from brevitas_bp.kernels.gpu.codes import word_of
from brevitas_bp.kernels.gpu.floats import bits_of, float_of

#: The transforms that :func:`rotate` implements. Their numbers are the numbers of rotations.
TRANSFORMS = frozenset({NO_TRANSFORM, ROTATED, ROTATED_TWICE})
assert [NO_TRANSFORM.number, ROTATED.number, ROTATED_TWICE.number] == [0, 1, 2]
_SLICES = tl.constexpr(8)
_GROUP = tl.constexpr(GROUP)
_SIGN = tl.constexpr(1 << 31)


@triton.jit
def sign_words(
        bucket: tl.tensor, lane: tl.tensor, k0: tl.tensor, k1: tl.tensor,
        size: tl.constexpr) -> tl.tensor:
    """Returns the random words of all slices, each [buckets, lanes]: see ``rotation.sign_words``."""
    first = (bucket * (size // _GROUP)).to(tl.uint32)[:, None]
    out = ()
    for s in tl.static_range(_SLICES):
        group = (lane + s * (size // 8)) // _GROUP
        out = out + (word_of(first + group.to(tl.uint32), k0, k1),)
    return out


@triton.jit
def _change_signs(
        xs: tl.tuple, words: tl.tuple, lane: tl.tensor, rotation: tl.constexpr,
        size: tl.constexpr) -> tl.tensor:
    out = ()
    for s in tl.static_range(_SLICES):
        bit = (lane + s * (size // 8)) % _GROUP + rotation * _GROUP
        sign = (words[s] << (31 - bit).to(tl.uint32)) & _SIGN
        out = out + (float_of(bits_of(xs[s]) ^ sign.to(tl.int32)),)
    return out


@triton.jit
def _butterfly(
        x: tl.tensor, stride: tl.constexpr, buckets: tl.constexpr, lanes: tl.constexpr) -> tl.tensor:
    """Replaces the elements ``a`` and ``b`` of each pair by ``a + b`` and ``a - b``."""
    pairs = tl.reshape(x, [buckets, lanes // (2 * stride), 2, stride * _SLICES])
    # The sum of two integers, less the own one, is the partner's. A reduction of two elements is one
    # exchange between threads, or none.
    bits = bits_of(pairs)
    partner = float_of(tl.sum(bits, axis=2, keep_dims=True) - bits)
    second = tl.arange(0, 2)[None, None, :, None] == 1
    return tl.reshape(partner + tl.where(second, -pairs, pairs), [buckets, lanes, _SLICES])


@triton.jit
def _joined(xs: tl.tuple) -> tl.tensor:
    """Joins slices, so that one operation handles all; they stay within their threads."""
    a = tl.join(tl.join(xs[0], xs[4]), tl.join(xs[2], xs[6]))
    b = tl.join(tl.join(xs[1], xs[5]), tl.join(xs[3], xs[7]))
    return tl.join(a, b)


@triton.jit
def _split(x: tl.tensor) -> tl.tensor:
    """Inverts :func:`_joined`."""
    a, b = tl.split(x)
    a0, a1 = tl.split(a)
    b0, b1 = tl.split(b)
    x0, x4 = tl.split(a0)
    x2, x6 = tl.split(a1)
    x1, x5 = tl.split(b0)
    x3, x7 = tl.split(b1)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _pair_slices(xs: tl.tuple, stride: tl.constexpr) -> tl.tensor:
    """Makes the butterflies of pairs of slices, which lie ``stride`` slices apart."""
    out = ()
    for s in tl.static_range(_SLICES):
        partner = xs[s ^ stride]
        if s & stride:
            out = out + (partner - xs[s],)
        else:
            out = out + (xs[s] + partner,)
    return out


@triton.jit
def _hadamard(
        xs: tl.tuple, buckets: tl.constexpr, lanes: tl.constexpr, levels: tl.constexpr) -> tl.tensor:
    """See ``rotation.hadamard``; there are ``2**levels`` lanes."""
    x = tl.reshape(_joined(xs), [buckets, lanes, _SLICES])
    for level in tl.static_range(levels):
        x = _butterfly(x, 1 << level, buckets, lanes)
    xs = _split(tl.reshape(x, [buckets, lanes, 2, 2, 2]))
    return _pair_slices(_pair_slices(_pair_slices(xs, 1), 2), 4)


@triton.jit
def _divided(xs: tl.tuple, size: tl.constexpr) -> tl.tensor:
    out = ()
    for s in tl.static_range(_SLICES):
        out = out + (xs[s] * (1 / size),)
    return out


@triton.jit
def rotate(
        xs: tl.tuple, words: tl.tuple, lane: tl.tensor, rotations: tl.constexpr, size: tl.constexpr,
        buckets: tl.constexpr, lanes: tl.constexpr, levels: tl.constexpr) -> tl.tensor:
    """See ``rotation.rotate``."""
    for rotation in tl.static_range(rotations):
        xs = _change_signs(xs, words, lane, rotation, size)
        xs = _divided(_hadamard(xs, buckets, lanes, levels), size)
    return xs


@triton.jit
def rotate_back(
        ys: tl.tuple, words: tl.tuple, lane: tl.tensor, rotations: tl.constexpr, size: tl.constexpr,
        buckets: tl.constexpr, lanes: tl.constexpr, levels: tl.constexpr) -> tl.tensor:
    """See ``rotation.rotate_back``."""
    for i in tl.static_range(rotations):
        ys = _change_signs(
            _hadamard(ys, buckets, lanes, levels), words, lane, rotations - 1 - i, size)
    return ys
