"""Fast forms for CPU tensors, compiled by numba: one pass over each bucket while it is in cache.

They give the bytes of :mod:`brevitas_bp.kernels.reference`: the same order of float32 operations, no
fused multiply-add (no ``fastmath``), minima and maxima taken on the sortable integer form of a float,
where NaN is extreme, and every integer cast to 32 bits explicitly (numba promotes to 64).

Kernels release the interpreter lock and run serially on a range of buckets; large tensors are split
over a small pool of threads. numba's own parallel layer is not used: its default one aborts the process
when two Python threads enter it.

Not here, but in the reference: float64, and buckets of a whole tensor.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from brevitas_bp.kernels.random import HASH_LAST_SHIFT, HASH_ROUNDS, NOISE_BITS, noise_keys
from brevitas_bp.kernels.reference import (
    RANGE_LIMIT,
    Encoded,
    bucket_shape,
    draw_layout,
    payload_nbytes,
)
from brevitas_bp.kernels.spec import BucketQuantSpec, lowest_code, top_code

LARGEST_BUCKET = 1 << 16
_RULES = {"min_max": 0, "max": 1, "l2": 2}
# Elements below which a second thread costs more than it saves: between torch's own parallel regions its
# idle threads spin, and compete with ours.
_SPLIT = 1 << 19
# Elements converted at once where the input is not float32.
_CHUNK = 1 << 20

_U = np.uint32
_F = np.float32
_MAX = _F(np.finfo(np.float32).max)
_LIMIT = _F(float(np.finfo(np.float32).max) * RANGE_LIMIT)
_TINY = _F(np.finfo(np.float32).tiny)
_BF16_MIN = _F(torch.finfo(torch.bfloat16).min)
_NAN = _F(np.nan)
_S0, _M0 = _U(HASH_ROUNDS[0][0]), _U(HASH_ROUNDS[0][1])
_S1, _M1 = _U(HASH_ROUNDS[1][0]), _U(HASH_ROUNDS[1][1])
_S2, _M2 = _U(HASH_ROUNDS[2][0]), _U(HASH_ROUNDS[2][1])
_S3 = _U(HASH_LAST_SHIFT)
_TO_NOISE = _U(32 - NOISE_BITS)
_STEP = _F(2.0**-NOISE_BITS)
_SIGN_BITS = np.int32(31)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INF_BITS = np.int32(0x7F800000)
_HALF_WORD = np.int32(-65536)
_HALF_BITS, _HALF_MASK, _NAN_BITS = np.int32(16), np.int32(0xFFFF), np.int32(0x7FC00000)
_B1, _B2, _B4 = np.uint8(1), np.uint8(3), np.uint8(15)
_B2S, _B4S, _B6S = np.uint8(2), np.uint8(4), np.uint8(6)

_jit = numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)


@_jit
def _round_down_bf16(value: Any, bits: Any) -> Any:
    """See ``reference.round_down``; ``bits`` is an int32 view of one float32."""
    view = bits.view(np.float32)
    view[0] = value
    truncated = np.int32(bits[0] & _HALF_WORD)
    if bits[0] < 0 and truncated != bits[0]:
        truncated = np.int32(truncated + np.int32(65536))
    bits[0] = truncated
    return max(view[0], _BF16_MIN)


@_jit
def _reciprocal(scale: Any) -> Any:
    return _F(1) / scale if scale >= _TINY else _F(0)


@_jit
def _norm(x: Any, scratch: Any) -> Any:
    """See ``reference.l2_norm``: the same binary tree."""
    n = x.size
    for i in range(n):
        scratch[i] = np.float64(x[i]) * np.float64(x[i])
    while n > 1:
        half = (n + 1) // 2
        for i in range(n - half):
            scratch[i] += scratch[half + i]
        n = half
    return _F(math.sqrt(scratch[0]))


@_jit
def _metadata(x: Any, rule: Any, top: Any, bf16: Any, integer: Any, one: Any, scratch: Any) -> Any:
    """Scale and offset of one bucket; NaN where it holds NaN or Inf."""
    bits = x.view(np.int32)
    view = one.view(np.float32)
    if rule == 0:
        lowest, highest = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        for i in range(bits.size):
            key = np.int32(bits[i] ^ ((bits[i] >> _SIGN_BITS) & _MAGNITUDE))
            lowest = min(lowest, key)
            highest = max(highest, key)
        if lowest <= np.int32(~_INF_BITS) or highest >= _INF_BITS:
            return _NAN, _NAN
        one[0] = np.int32(lowest ^ ((lowest >> _SIGN_BITS) & _MAGNITUDE))
        lo = view[0] + _F(0)
        one[0] = np.int32(highest ^ ((highest >> _SIGN_BITS) & _MAGNITUDE))
        hi = view[0] + _F(0)
        if bf16:
            lo = _round_down_bf16(lo, one)
        scale = min(hi - lo, _LIMIT) / _F(top)
        if bf16:
            scale = -_round_down_bf16(-scale, one)
        inverse = _reciprocal(scale)
        if integer and inverse > _F(0):
            lo = -_F(np.rint(-lo * inverse)) * scale + _F(0)
        return scale, lo
    peak = np.int32(0)
    for i in range(bits.size):
        peak = max(peak, np.int32(bits[i] & _MAGNITUDE))
    if peak >= _INF_BITS:
        return _NAN, _F(0)
    one[0] = peak
    norm = view[0] if rule == 1 else _norm(x, scratch)
    scale = min(norm, _LIMIT) / _F(top)
    if bf16:
        scale = -_round_down_bf16(-scale, one)
    return scale, _F(0)


@_jit
def _round_stochastic(
        x: Any, codes: Any, lo: Any, inverse: Any, lowest: Any, top: Any, index: Any, k0: Any,
        k1: Any) -> None:
    shift = np.int32(lowest)
    low, high = _F(lowest), _F(top)
    for i in range(x.size):
        u = (x[i] - lo) * inverse
        h = _U(_U(index + _U(i)) + k0)
        h = _U(_U(h ^ _U(h >> _S0)) * _M0)
        h = _U(h ^ k1)
        h = _U(_U(h ^ _U(h >> _S1)) * _M1)
        h = _U(_U(h ^ _U(h >> _S2)) * _M2)
        h = _U(h ^ _U(h >> _S3))
        noise = _F(np.int32(h >> _TO_NOISE)) * _STEP
        floor = np.floor(u)
        q = floor + (_F(1) if noise < u - floor else _F(0))
        q = low if q < low else q
        q = high if q > high else q
        codes[i] = np.uint8(np.int32(q) - shift)


@_jit
def _round_nearest(
        x: Any, codes: Any, lo: Any, inverse: Any, lowest: Any, top: Any) -> None:
    shift = np.int32(lowest)
    low, high = _F(lowest), _F(top)
    for i in range(x.size):
        q = np.rint((x[i] - lo) * inverse)
        q = low if q < low else q
        q = high if q > high else q
        codes[i] = np.uint8(np.int32(q) - shift)


# Each plane is written out: one loop over its bytes, which the compiler turns into vector code.


@_jit
def _pack(codes: Any, width: Any, out: Any) -> None:
    size = codes.size
    if width == 8:
        out[:] = codes
        return
    start, first = 0, np.uint8(0)
    if width & 4:
        n = size // 2
        plane = out[start:start + n]
        for j in range(n):
            plane[j] = np.uint8(codes[j] & _B4) | np.uint8(np.uint8(codes[n + j] & _B4) << _B4S)
        start, first = start + n, np.uint8(4)
    if width & 2:
        n = size // 4
        plane = out[start:start + n]
        for j in range(n):
            a = np.uint8(np.uint8(codes[j] >> first) & _B2)
            b = np.uint8(np.uint8(codes[n + j] >> first) & _B2)
            c = np.uint8(np.uint8(codes[2 * n + j] >> first) & _B2)
            d = np.uint8(np.uint8(codes[3 * n + j] >> first) & _B2)
            low = np.uint8(a | np.uint8(b << _B2S))
            plane[j] = np.uint8(low | np.uint8(np.uint8(c | np.uint8(d << _B2S)) << _B4S))
        start, first = start + n, np.uint8(first + np.uint8(2))
    if width & 1:
        n = size // 8
        plane = out[start:start + n]
        plane[:] = 0
        for i in range(8):
            part = codes[i * n:(i + 1) * n]
            shift = np.uint8(i)
            for j in range(n):
                bit = np.uint8(np.uint8(part[j] >> first) & _B1)
                plane[j] = np.uint8(plane[j] | np.uint8(bit << shift))


@_jit
def _unpack(packed: Any, width: Any, codes: Any) -> None:
    size = codes.size
    if width == 8:
        codes[:] = packed
        return
    start, first = 0, np.uint8(0)
    if width & 4:
        n = size // 2
        plane = packed[start:start + n]
        for j in range(n):
            codes[j] = np.uint8(plane[j] & _B4)
            codes[n + j] = np.uint8(plane[j] >> _B4S)
        start, first = start + n, np.uint8(4)
    else:
        codes[:] = 0
    if width & 2:
        n = size // 4
        plane = packed[start:start + n]
        for j in range(n):
            v = plane[j]
            codes[j] |= np.uint8(np.uint8(v & _B2) << first)
            codes[n + j] |= np.uint8(np.uint8(np.uint8(v >> _B2S) & _B2) << first)
            codes[2 * n + j] |= np.uint8(np.uint8(np.uint8(v >> _B4S) & _B2) << first)
            codes[3 * n + j] |= np.uint8(np.uint8(v >> _B6S) << first)
        start, first = start + n, np.uint8(first + np.uint8(2))
    if width & 1:
        n = size // 8
        plane = packed[start:start + n]
        for i in range(8):
            part = codes[i * n:(i + 1) * n]
            shift = np.uint8(i)
            for j in range(n):
                bit = np.uint8(np.uint8(plane[j] >> shift) & _B1)
                part[j] = np.uint8(part[j] | np.uint8(bit << first))


@_jit
def _locate(
        bucket: Any, size: Any, n: Any, mixed: Any, multiplier: Any, shift: Any, widths: Any) -> Any:
    """Which width a bucket has (1: the mixed one) and where its bytes begin."""
    slot = (multiplier * bucket + shift) % n
    if slot < mixed:
        return 1, slot * (size * widths[1] // 8)
    return 0, mixed * (size * widths[1] // 8) + (slot - mixed) * (size * widths[0] // 8)


@_jit
def _store(halves: Any, begin: Any, values: Any, bf16: Any) -> None:
    """Writes float32 numbers, or their upper halves: all there is of those rounded to bfloat16."""
    words = values.view(np.int32)
    for i in range(words.size):
        # NaN has one bit pattern, whichever operation made it.
        word = _NAN_BITS if np.isnan(values[i]) else words[i]
        upper = np.uint16((word >> _HALF_BITS) & _HALF_MASK)
        if bf16:
            halves[begin + i] = upper
        else:
            halves[2 * (begin + i)] = np.uint16(word & _HALF_MASK)
            halves[2 * (begin + i) + 1] = upper


@_jit
def _load(halves: Any, index: Any, bf16: Any, one: Any, view: Any) -> Any:
    """Reads what :func:`_store` wrote; ``one`` and ``view`` are the same four bytes."""
    if bf16:
        one[0] = np.int32(np.int32(halves[index]) << _HALF_BITS)
    else:
        one[0] = np.int32(np.int32(halves[2 * index + 1]) << _HALF_BITS) | np.int32(halves[2 * index])
    return view[0]


@_jit
def _encode(
        x: Any, first: Any, begin: Any, end: Any, size: Any, n: Any, mixed: Any, multiplier: Any,
        shift: Any, widths: Any, tops: Any, lowests: Any, rule: Any, bf16: Any, integer: Any,
        stochastic: Any, k0: Any, k1: Any, payload: Any, metadata: Any) -> None:
    """Buckets ``begin .. end - 1``; ``x`` starts with bucket ``first``.

    ``metadata`` holds the scales, then for affine codes the offsets, in halves of a float32.
    """
    codes = np.empty(size, np.uint8)
    padded = np.empty(size, np.float32)
    one = np.empty(1, np.int32)
    scratch = np.empty(size if rule == 2 else 1, np.float64)
    scales, offsets = np.empty(end - begin, np.float32), np.empty(end - begin, np.float32)
    for bucket in range(begin, end):
        kind, position = _locate(bucket, size, n, mixed, multiplier, shift, widths)
        width = widths[kind]
        nbytes = size * width // 8
        start = (bucket - first) * size
        if start + size <= x.size:
            values = x[start:start + size]
        else:
            valid = x.size - start
            padded[:valid] = x[start:]
            padded[valid:] = _F(0) if rule == 2 else x[x.size - 1]
            values = padded
        scale, lo = _metadata(values, rule, tops[kind], bf16, integer, one, scratch)
        scales[bucket - begin] = scale
        offsets[bucket - begin] = lo
        if np.isnan(scale):
            codes[:] = 0
        elif stochastic:
            _round_stochastic(
                values, codes, lo, _reciprocal(scale), lowests[kind], tops[kind],
                _U((bucket * size) & 0xFFFFFFFF), k0, k1)
        else:
            _round_nearest(values, codes, lo, _reciprocal(scale), lowests[kind], tops[kind])
        _pack(codes, width, payload[position:position + nbytes])
    # Not within the loop, which the compiler then makes worse.
    _store(metadata, begin, scales, bf16)
    if rule == 0:
        _store(metadata, n + begin, offsets, bf16)


@_jit
def _decode(
        out: Any, first: Any, begin: Any, end: Any, size: Any, n: Any, mixed: Any, multiplier: Any,
        shift: Any, widths: Any, lowests: Any, bf16: Any, payload: Any, scales: Any, offsets: Any,
        limit: Any) -> None:
    """Buckets ``begin .. end - 1`` into ``out``, which starts with bucket ``first``."""
    codes = np.empty(size, np.uint8)
    one = np.empty(1, np.int32)
    view = one.view(np.float32)
    for bucket in range(begin, end):
        kind, position = _locate(bucket, size, n, mixed, multiplier, shift, widths)
        width = widths[kind]
        nbytes = size * width // 8
        _unpack(payload[position:position + nbytes], width, codes)
        lowest = np.int32(lowests[kind])
        scale = _load(scales, bucket, bf16, one, view)
        lo = _load(offsets, bucket, bf16, one, view) if offsets.size else _F(0)
        start = (bucket - first) * size
        count = min(size, out.size - start)
        values = out[start:start + count]
        for i in range(count):
            y = _F(np.int32(codes[i]) + lowest) * scale + lo
            y = limit if y > limit else y
            values[i] = -limit if y < -limit else y


def supports(flat_dtype: torch.dtype, spec: BucketQuantSpec) -> bool:
    """Whether these kernels cover a tensor of this dtype."""
    return flat_dtype != torch.float64 and spec.bucket_size is not None and (
        spec.bucket_size <= LARGEST_BUCKET)


def encode(flat: Tensor, spec: BucketQuantSpec, seed: int) -> Encoded:
    """See :func:`brevitas_bp.kernels.reference.encode`."""
    n, size = bucket_shape(flat.numel(), spec.bucket_size)
    layout = draw_layout(n, spec, seed)
    static = _static(spec)
    width = spec.bit_width * size // 8
    nbytes = n * width if layout.mixed == 0 else payload_nbytes(layout, spec, size)
    payload = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    halves = n if static.bf16 else 2 * n
    metadata = torch.empty(halves * (1 + spec.affine), dtype=torch.int16, device="cpu")
    k0, k1 = noise_keys(seed) if spec.stochastic else (0, 0)
    shared = (
        size, n, layout.mixed, layout.multiplier, layout.shift, static.widths, static.tops,
        static.lowests, static.rule, static.bf16, spec.integer_zero_point, spec.stochastic, _U(k0),
        _U(k1), payload.numpy(), metadata.numpy().view(np.uint16))
    flat = flat.detach()
    for first, last in _converted(flat.dtype, n, size):
        part = flat if last - first == n else flat[first * size:last * size]
        _run(_encode, (part.to(torch.float32).numpy(), first), first, last, size, shared)
    scales = metadata.view(torch.bfloat16 if static.bf16 else torch.float32)
    return Encoded(payload, scales[:n], scales[n:]) if spec.affine else Encoded(
        payload, scales, None)


def decode(
        encoded: Encoded, spec: BucketQuantSpec, seed: int, numel: int,
        dtype: torch.dtype) -> Tensor:
    """See :func:`brevitas_bp.kernels.reference.decode`."""
    return decode_into(torch.empty(numel, dtype=dtype, device="cpu"), encoded, spec, seed)


def decode_into(out: Tensor, encoded: Encoded, spec: BucketQuantSpec, seed: int) -> Tensor:
    """Decodes into ``out``, a flat contiguous tensor, and returns it."""
    n, size = bucket_shape(out.numel(), spec.bucket_size)
    layout = draw_layout(n, spec, seed)
    static = _static(spec)
    scales = _halves(encoded.scale)
    offsets = scales[:0] if encoded.offset is None else _halves(encoded.offset)
    shared = (
        size, n, layout.mixed, layout.multiplier, layout.shift, static.widths, static.lowests,
        static.bf16, encoded.payload.numpy(), scales, offsets, _largest(out.dtype))
    for first, last in _converted(out.dtype, n, size):
        part = out if last - first == n else out[first * size:last * size]
        values = part if out.dtype == torch.float32 else torch.empty(
            part.numel(), dtype=torch.float32, device="cpu")
        _run(_decode, (values.numpy(), first), first, last, size, shared)
        if values is not part:
            part.copy_(values)
    return out


def _halves(metadata: Tensor) -> Any:
    return metadata.view(torch.int16).numpy().view(np.uint16)


class _Static(NamedTuple):
    """What the kernels take of a spec; widths and codes of (base, mixed) buckets."""

    widths: tuple[int, int]
    tops: tuple[int, int]
    lowests: tuple[int, int]
    rule: int
    bf16: bool


@lru_cache(maxsize=256)
def _static(spec: BucketQuantSpec) -> _Static:
    base, mixed = spec.bit_width, spec.mix_bit_width or spec.bit_width
    return _Static(
        (base, mixed), (top_code(spec.code_range, base), top_code(spec.code_range, mixed)),
        (lowest_code(spec.code_range, base), lowest_code(spec.code_range, mixed)),
        _RULES[spec.scale_rule], spec.metadata_dtype == torch.bfloat16)


@lru_cache(maxsize=8)
def _largest(dtype: torch.dtype) -> Any:
    return _F(torch.finfo(dtype).max)


def _converted(dtype: torch.dtype, n: int, size: int) -> list[tuple[int, int]]:
    """Ranges of buckets handled at once: all of them, or chunks that are converted to float32."""
    step = max(n, 1) if dtype == torch.float32 else max(1, _CHUNK // size)
    return [(first, min(first + step, n)) for first in range(0, n, step)]


_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    # A forked child has the pool but none of its threads.
    os.register_at_fork(after_in_child=_forget_pool)


def _run(
        kernel: Callable[..., None], head: tuple[Any, ...], first: int, last: int, size: int,
        shared: tuple[Any, ...]) -> None:
    """Runs ``kernel`` on buckets ``first .. last - 1``, in several threads where it pays."""
    global _pool
    threads = min(torch.get_num_threads(), (last - first) * size // _SPLIT, last - first)
    if threads <= 1:
        kernel(*head, first, last, *shared)
        return
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="brevitas_bp")
    cuts = [first + (last - first) * i // threads for i in range(threads + 1)]
    futures = [_pool.submit(kernel, *head, a, b, *shared) for a, b in pairwise(cuts[1:])]
    try:
        kernel(*head, cuts[0], cuts[1], *shared)
    finally:
        for future in futures:
            future.result()
