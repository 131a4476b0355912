"""Compiled CPU kernels for buckets too large for a cache, including a bucket of a whole tensor.

They read the data twice, not once: first for the range of all elements, then for codes and bytes. Both
steps work in pieces that a cache holds and that threads share.

NOTE [ A bucket in pieces ] in :mod:`brevitas_bp.format.pieces` defines the pieces.
"""

import sys
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brevitas_bp.format.arithmetic import compute_dtype, l2_norm
from brevitas_bp.format.pieces import segments_of
from brevitas_bp.format.random import noise_keys
from brevitas_bp.format.reference import Encoded, bucket_shape, draw_layout, payload_nbytes
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import (
    COMPANDED,
    DITHERED,
    L2,
    MAX,
    MIN_MAX,
    NO_TRANSFORM,
    ZERO_IN_RANGE,
)
from brevitas_bp.kernels.cpu.codes import (
    ROUNDINGS,
    copy_bytes,
    dequantize,
    locate,
    pack,
    round_codes,
    unpack,
)
from brevitas_bp.kernels.cpu.compiling import jit
from brevitas_bp.kernels.cpu.derivatives import derivative
from brevitas_bp.kernels.cpu.launch import Static, static_of
from brevitas_bp.kernels.cpu.metadata import (
    affine_metadata,
    extremes,
    finish_scales,
    reciprocal,
    store,
)
from brevitas_bp.kernels.cpu.threads import run_in_pool
from brevitas_bp.kernels.launchers import CODE_RANGES, Launcher, StepwiseLauncher

# Columns of a piece: the codes of eight segments are 8 KiB.
_PIECE = 1024
# Elements of a piece when the range is computed, and elements converted at once if the input has 16
# bits.
_RANGE_PIECE = 1 << 14
_CHUNK = 1 << 20

_U = np.uint32
_NUMBERS = {torch.float32: np.float32, torch.float64: np.float64}
#: The stages that these kernels implement.
COVERED = ROUNDINGS - {DITHERED, COMPANDED} | CODE_RANGES | {
    NO_TRANSFORM, MIN_MAX, MAX, L2, ZERO_IN_RANGE}
_INTEGERS = {torch.float32: np.int32, torch.float64: np.int64}


def covers(spec: BucketQuantSpec, numel: int, dtype: torch.dtype) -> bool:
    """Returns whether these kernels serve such tensors: all stages, and buckets of any size."""
    return dtype.is_floating_point and spec.is_covered_by(COVERED)


def launcher(spec: BucketQuantSpec, numel: int, dtype: torch.dtype) -> Launcher:
    """See :func:`brevitas_bp.kernels.dispatch.launcher`."""
    this: Any = sys.modules[__name__]
    return StepwiseLauncher(this, spec, numel, dtype, derivative)


@jit
def _extremes_of_pieces(bits: Any, begin: Any, end: Any, size: Any, out: Any) -> None:
    for piece in range(begin, end):
        lowest, highest = extremes(bits[piece * size:(piece + 1) * size])
        out[piece, 0] = lowest
        out[piece, 1] = highest


@jit
def _copy_runs(
        packed: Any, payload: Any, width: Any, period: Any, segments: Any, column: Any, length: Any,
        into: Any) -> None:
    """Copies a packed piece into the planes of its bucket, or out of them."""
    local, plane = 0, 0
    for bits in (8, 4, 2, 1):
        if width & bits:
            runs = segments * bits // 8
            for i in range(runs):
                start = plane + i * period + column
                there, here = payload[start:start + length], packed[local:local + length]
                if into:
                    copy_bytes(here, there)
                else:
                    copy_bytes(there, here)
                local += length
            plane += runs * period


@jit
def _encode_pieces(
        x: Any, first: Any, begin: Any, end: Any, stride: Any, numel: Any, period: Any,
        segments: Any, width: Any, lo: Any, scale: Any, lowest: Any, top: Any, pad: Any,
        rounding: Any, index: Any, k0: Any, k1: Any, payload: Any) -> None:
    """Encodes pieces ``begin .. end - 1`` of one bucket.

    Column ``j`` of segment ``i`` is ``x[i * stride + j - first]``. Elements from ``numel`` on are
    ``pad``. ``index`` is the flat index of the first element of the bucket.
    """
    codes = np.empty(segments * _PIECE, np.uint8)
    packed = np.empty(codes.size * width // 8, np.uint8)
    padded = np.empty(_PIECE, x.dtype)
    inverse = reciprocal(scale, x.dtype)
    for piece in range(begin, end):
        column = piece * _PIECE
        length = min(_PIECE, period - column)
        for i in range(segments):
            part = codes[i * length:(i + 1) * length]
            element, at = i * period + column, i * stride + column - first
            valid = max(0, min(length, numel - element))
            if valid == length:
                values = x[at:at + length]
            else:
                padded[:valid] = x[at:at + valid]
                padded[valid:] = pad
                values = padded[:length]
            if np.isnan(scale):
                part[:] = 0
            else:
                round_codes(
                    rounding, values, part, lo, inverse, lowest, top,
                    _U((index + element) & 0xFFFFFFFF), k0, k1)
        nbytes = segments * length * width // 8
        pack(codes[:segments * length], width, packed[:nbytes])
        _copy_runs(packed, payload, width, period, segments, column, length, True)


@jit
def _decode_pieces(
        out: Any, first: Any, begin: Any, end: Any, stride: Any, numel: Any, period: Any,
        segments: Any, width: Any, lo: Any, scale: Any, lowest: Any, limit: Any,
        payload: Any) -> None:
    """Inverts :func:`_encode_pieces`."""
    codes = np.empty(segments * _PIECE, np.uint8)
    packed = np.empty(codes.size * width // 8, np.uint8)
    for piece in range(begin, end):
        column = piece * _PIECE
        length = min(_PIECE, period - column)
        nbytes = segments * length * width // 8
        _copy_runs(packed, payload, width, period, segments, column, length, False)
        unpack(packed[:nbytes], width, codes[:segments * length])
        for i in range(segments):
            at = i * stride + column - first
            valid = max(0, min(length, numel - i * period - column))
            dequantize(
                codes[i * length:(i + 1) * length], lowest, scale, lo, limit,
                out[at:at + valid])


def encode(flat: Tensor, spec: BucketQuantSpec, seed: int) -> Encoded:
    """See :func:`brevitas_bp.format.reference.encode`."""
    n, size = bucket_shape(flat.numel(), spec.bucket_size)
    layout, static = draw_layout(n, spec, seed), static_of(spec, compute_dtype(flat.dtype))
    payload = torch.empty(payload_nbytes(layout, spec, size), dtype=torch.uint8, device="cpu")
    metadata = torch.empty(n * (1 + spec.affine), dtype=static.stored, device="cpu")
    values = torch.empty(n * (1 + spec.affine), dtype=static.computed, device="cpu").numpy()
    keys = noise_keys(seed) if spec.rounding.encoding_draws else (0, 0)
    for bucket, part in enumerate(flat.detach().split(max(size, 1)) if n else ()):
        kind, position = locate(
            bucket, size, n, layout.mixed, layout.multiplier, layout.shift, static.widths)
        scale, lo = _metadata(part, size, spec, static, static.tops[kind])
        values[bucket::n] = (scale, lo)[:1 + spec.affine]
        last = part.new_zeros(1) if spec.pads_with_zero else part[-1:]
        shared = (
            lo, scale, static.lowests[kind], static.tops[kind],
            last.to(static.computed).numpy()[0], spec.rounding.number, bucket * size, _U(keys[0]),
            _U(keys[1]), payload.numpy()[position:])
        _on_pieces(_encode_pieces, part, size, static.widths[kind], shared, writes=False)
    store(metadata.view(torch.int16).numpy().view(np.uint16), 0, values, static.bf16)
    return Encoded(payload, metadata, spec.affine)


def decode(
        encoded: Encoded, spec: BucketQuantSpec, seed: int, numel: int,
        dtype: torch.dtype) -> Tensor:
    """See :func:`brevitas_bp.format.reference.decode`."""
    return decode_into(torch.empty(numel, dtype=dtype, device="cpu"), encoded, spec, seed)


def decode_into(out: Tensor, encoded: Encoded, spec: BucketQuantSpec, seed: int) -> Tensor:
    """Decodes into ``out``, a flat contiguous tensor, and returns it."""
    n, size = bucket_shape(out.numel(), spec.bucket_size)
    layout, static = draw_layout(n, spec, seed), static_of(spec, compute_dtype(out.dtype))
    scales = encoded.scale.to(static.computed).numpy()
    offset = encoded.offset
    offsets = np.zeros_like(scales) if offset is None else offset.to(static.computed).numpy()
    for bucket, part in enumerate(out.split(max(size, 1)) if n else ()):
        kind, position = locate(
            bucket, size, n, layout.mixed, layout.multiplier, layout.shift, static.widths)
        shared = (
            offsets[bucket], scales[bucket], static.lowests[kind], _largest(out.dtype),
            encoded.payload.numpy()[position:])
        _on_pieces(_decode_pieces, part, size, static.widths[kind], shared, writes=True)
    return out


def _on_pieces(
        kernel: Any, part: Tensor, size: int, width: int, shared: tuple[Any, ...], *,
        writes: bool) -> None:
    """Runs ``kernel`` on the pieces of one bucket; ``part`` is the bucket without its padding."""
    numel, segments = part.numel(), segments_of(width)
    period = size // segments
    pieces = -(-period // _PIECE)
    if part.dtype in _INTEGERS:
        run_in_pool(kernel, (part.numpy(), 0), 0, pieces, segments * _PIECE,
             (period, numel, period, segments, width, *shared))
        return
    step = max(1, _CHUNK // (segments * _PIECE))
    stride = min(step * _PIECE, period)
    buffer = torch.empty((segments, stride), dtype=torch.float32, device="cpu")
    for begin in range(0, pieces, step):
        first = begin * _PIECE
        stop = min(first + stride, period)
        rows = [part[i * period + first:i * period + stop] for i in range(segments)]
        pairs = [(row, copy[:row.numel()]) for row, copy in zip(rows, buffer)]
        for row, copy in () if writes else pairs:
            copy.copy_(row)
        run_in_pool(kernel, (buffer.view(-1).numpy(), first), begin, min(begin + step, pieces),
             segments * _PIECE, (stride, numel, period, segments, width, *shared))
        for row, copy in pairs if writes else ():
            row.copy_(copy)


def _metadata(
        part: Tensor, size: int, spec: BucketQuantSpec, static: Static,
        top: int) -> tuple[Any, Any]:
    """Returns scale and offset of one bucket, in the compute dtype."""
    number = _NUMBERS[static.computed]
    lows, highs = (np.array([key], _INTEGERS[static.computed]) for key in _extremes(part, static))
    tops = np.array([top], number)
    if spec.affine:
        affine_metadata(lows, highs, tops, static.bf16, spec.offset_form)
        return highs.view(number)[0], lows.view(number)[0]
    peak = number(_peak(lows[0], highs[0]).view(number))
    if not np.isfinite(peak):
        return number(np.nan), number(0)
    norm = l2_norm(part.unsqueeze(0), size).item() if spec.scale_rule is L2 else peak
    scale = np.array([norm], number)
    finish_scales(scale, tops, static.bf16)
    return scale[0], number(0)


def _peak(*keys: Any) -> Any:
    """Returns the largest magnitude of integers that sort like floats, as the bits of the float."""
    info = np.iinfo(keys[0])
    return max((key ^ (key >> (info.bits - 1) & info.max)) & info.max for key in keys)


@lru_cache(maxsize=8)
def _largest(dtype: torch.dtype) -> Any:
    """Returns the largest float of ``dtype``, in the compute dtype."""
    return _NUMBERS[compute_dtype(dtype)](torch.finfo(dtype).max)


def _extremes(part: Tensor, static: Static) -> tuple[Any, Any]:
    """Returns the smallest and the largest element, as integers that sort like the floats."""
    integers = _INTEGERS[static.computed]
    found = []
    for source in part.split(max(part.numel(), 1) if part.dtype in _INTEGERS else _CHUNK):
        bits = source.to(static.computed).numpy().view(integers)
        pieces = -(-bits.size // _RANGE_PIECE)
        out = np.empty((pieces, 2), integers)
        run_in_pool(_extremes_of_pieces, (bits,), 0, pieces, _RANGE_PIECE, (_RANGE_PIECE, out))
        found.append(out)
    both = np.concatenate(found)
    return both[:, 0].min(), both[:, 1].max()
