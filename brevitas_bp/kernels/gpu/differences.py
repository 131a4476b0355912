"""Fast forms of :mod:`brevitas_bp.format.differences` for CUDA tensors, compiled by Triton: one pass.

A program handles a few chunks. The reference serves float64, and chunks that are too large or no power
of two. Nothing synchronises.
"""

# Triton's own types differ from the types that a checker infers from Python.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from brevitas_bp.activations.predictions import CENTRE, LEAST, MOST, Prediction
from brevitas_bp.format import differences
from brevitas_bp.format.differences import CHUNK, chunk_count
from brevitas_bp.kernels.gpu.floats import from_key, key_of, load, store
from brevitas_bp.kernels.gpu.options import FORMATS, LAUNCH, on

#: Elements of a chunk that a program holds.
LARGEST_CHUNK = 1 << 12
# Elements that a program handles.
_ELEMENTS = 1 << 11
_F32 = tl.constexpr(0)
_LEAST, _MOST, _CENTRE = tl.constexpr(LEAST), tl.constexpr(MOST), tl.constexpr(CENTRE)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_LOWEST_KEY, _HIGHEST_KEY = tl.constexpr(-(1 << 31)), tl.constexpr(0x7FFFFFFF)
_SIZES = ["total", "row"]


@triton.jit
def _places(
        total: tl.tensor, row: tl.tensor, chunk: tl.constexpr, chunks: tl.constexpr,
        lanes: tl.constexpr) -> tl.tensor:
    """Returns numbers of chunks, the first element of each, their elements, and which exist."""
    number = tl.program_id(0).to(tl.int64) * chunks + tl.arange(0, chunks)
    per_row = (row + (chunk - 1)) // chunk
    of_row = number // per_row
    inside = (number - of_row * per_row) * chunk
    lane = tl.arange(0, lanes)[None, :]
    size = tl.minimum(row - inside, chunk)[:, None]
    element = (of_row * row + inside)[:, None] + lane
    return number, inside[:, None] + lane, element, (number < total)[:, None] & (lane < size)


@triton.jit(do_not_specialize=_SIZES)
def _fill_kernel(
        x: tl.tensor, out: tl.tensor, strays: tl.tensor, total: tl.int64, row: tl.int64,
        chunk: tl.constexpr, chunks: tl.constexpr, lanes: tl.constexpr, levels: tl.constexpr,
        float_format: tl.constexpr) -> None:
    """Fills the zeros of ``chunks`` chunks."""
    _, _, element, exists = _places(total.to(tl.int64), row.to(tl.int64), chunk, chunks, lanes)
    values = load(x + element, exists, 0.0, float_format)
    given = values != 0
    sums = values
    # The binary tree of ``arithmetic.tree_sum``. More zeros would not change the sum.
    for level in tl.static_range(levels):
        sums = tl.sum(tl.reshape(sums, [chunks, 2, lanes >> (level + 1)]), axis=1)
    count = tl.maximum(tl.sum(given.to(tl.int32), axis=1), 1).to(tl.float32)
    mean = tl.div_rn(tl.reshape(sums, [chunks]), count)
    highest = from_key(tl.max(tl.where(exists, key_of(values), _LOWEST_KEY), axis=1))
    # The sum of large elements may be infinite.
    mean = tl.where(mean > highest, highest, mean)
    mean = tl.where(mean <= _LARGEST, mean, 0.0)
    filled = tl.where(given, values, mean[:, None])
    if strays is not None:
        filled = tl.where(tl.load(strays) != 0, values, filled)
    store(out + element, filled, exists, float_format)


@triton.jit
def _predicted(
        derivative: tl.tensor, c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor,
        c4: tl.tensor) -> tl.tensor:
    # NaN is not above the least derivative.
    cut = tl.where(derivative > _LEAST, derivative, _LEAST)
    t = tl.where(cut < _MOST, cut, _MOST) - _CENTRE
    return ((((t * c4 + c3) * t + c2) * t + c1) * t + c0) * t


@triton.jit
def _range_of(x: tl.tensor, exists: tl.tensor) -> tl.tensor:
    """Returns the range of each chunk; NaN if one of its elements is."""
    key = key_of(x)
    low = from_key(tl.min(tl.where(exists, key, _HIGHEST_KEY), axis=1))
    return from_key(tl.max(tl.where(exists, key, _LOWEST_KEY), axis=1)) - low


@triton.jit(do_not_specialize=_SIZES)
def _subtract_kernel(
        x: tl.tensor, out: tl.tensor, factors: tl.tensor, used: tl.tensor, total: tl.int64,
        row: tl.int64, c0: tl.float32, c1: tl.float32, c2: tl.float32, c3: tl.float32, c4: tl.float32,
        chunk: tl.constexpr, chunks: tl.constexpr, lanes: tl.constexpr) -> None:
    """Replaces derivatives in ``out`` by differences, or by ``x`` in chunks that these would widen."""
    number, inside, element, exists = _places(
        total.to(tl.int64), row.to(tl.int64), chunk, chunks, lanes)
    values = load(x + element, exists, 0.0, _F32)
    difference = values - _predicted(load(out + element, exists, 0.0, _F32), c0, c1, c2, c3, c4)
    if factors is not None:
        factor = load(factors + inside, exists, 0.0, _F32)
        before, after = _range_of(values * factor, exists), _range_of(difference * factor, exists)
    else:
        before, after = _range_of(values, exists), _range_of(difference, exists)
    narrower = after < before
    store(out + element, tl.where(narrower[:, None], difference, values), exists, _F32)
    tl.store(used + number, narrower.to(tl.uint8), number < total)


@triton.jit(do_not_specialize=_SIZES)
def _add_kernel(
        x: tl.tensor, derivative: tl.tensor, used: tl.tensor, total: tl.int64, row: tl.int64,
        c0: tl.float32, c1: tl.float32, c2: tl.float32, c3: tl.float32, c4: tl.float32,
        chunk: tl.constexpr, chunks: tl.constexpr, lanes: tl.constexpr) -> None:
    """Adds the prediction to the chunks that have a difference."""
    number, _, element, exists = _places(total.to(tl.int64), row.to(tl.int64), chunk, chunks, lanes)
    exists = exists & (tl.load(used + number, number < total, 0) != 0)[:, None]
    values = load(x + element, exists, 0.0, _F32)
    predicted = _predicted(load(derivative + element, exists, 0.0, _F32), c0, c1, c2, c3, c4)
    store(x + element, values + predicted, exists, _F32)


KERNELS: dict[str, Any] = {"fill": _fill_kernel, "subtract": _subtract_kernel, "add": _add_kernel}


def fill_zeros(x: Tensor, row: int, strays: Tensor | None = None) -> Tensor:
    """See :func:`brevitas_bp.format.differences.fill_zeros`."""
    if x.dtype not in FORMATS:
        return differences.fill_zeros(x, row, strays)
    out = torch.empty_like(x)
    _launch("fill", x, row, CHUNK, (x, out, strays), (), levels=_lanes(row, CHUNK).bit_length() - 1,
            float_format=FORMATS[x.dtype])
    return out


def subtract_prediction(
        x: Tensor, derivative: Tensor, prediction: Prediction, row: int,
        factors: Tensor | None = None, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """See :func:`brevitas_bp.format.differences.subtract_prediction`."""
    if not _covers(x, chunk):
        return differences.subtract_prediction(x, derivative, prediction, row, factors, chunk)
    used = x.new_empty(chunk_count(x.numel(), row, chunk), dtype=torch.uint8)
    given = None if factors is None else factors.to(x.dtype)
    _launch("subtract", x, row, chunk, (x, derivative, given, used), prediction.five)
    return derivative, used.view(torch.bool)


def add_prediction_(
        x: Tensor, derivative: Tensor, prediction: Prediction, row: int, used: Tensor,
        chunk: int = CHUNK) -> Tensor:
    """See :func:`brevitas_bp.format.differences.add_prediction_`."""
    if not _covers(x, chunk):
        return differences.add_prediction_(x, derivative, prediction, row, used, chunk)
    _launch("add", x, row, chunk, (x, derivative, used.view(torch.uint8)), prediction.five)
    return x


def _covers(x: Tensor, chunk: int) -> bool:
    return x.dtype == torch.float32 and chunk <= LARGEST_CHUNK and chunk & (chunk - 1) == 0


def _lanes(row: int, chunk: int) -> int:
    """Returns the elements of a chunk, padded to a power of two."""
    return 1 << (min(row, chunk) - 1).bit_length()


def _launch(
        name: str, x: Tensor, row: int, chunk: int, tensors: tuple[Tensor | None, ...],
        numbers: tuple[float, ...], **options: Any) -> None:
    total = chunk_count(x.numel(), row, chunk)
    if total:
        lanes = _lanes(row, chunk)
        chunks = max(1, _ELEMENTS // lanes)
        with on(x.device):
            KERNELS[name][(-(-total // chunks),)](
                *tensors, total, row, *numbers, chunk=chunk, chunks=chunks, lanes=lanes, **options,
                **LAUNCH)
