"""Fast forms of :mod:`brevitas_bp.format.differences` for CPU tensors, compiled by numba.

A compiler must not change the order of floating-point operations. So loops over a chunk that find a sum
or an extreme keep one result for each of several lanes, or add half of a buffer to the other half.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from brevitas_bp.activations.predictions import CENTRE, LEAST, MOST, Prediction
from brevitas_bp.format.differences import CHUNK, chunk_count
from brevitas_bp.kernels.cpu.compiling import inline, jit, wide_vectors
from brevitas_bp.kernels.cpu.threads import run_in_pool

_LANES = 32
_N = np.uint64


@jit
def _chunk(number: Any, row: Any) -> Any:
    """Returns the first element of a chunk, and the element after its last."""
    per_row = (row + CHUNK - 1) // CHUNK
    first = number // per_row * row
    start = first + number % per_row * CHUNK
    return start, min(start + CHUNK, first + row)


@jit
def _extremes(x: Any, low: Any, high: Any, unsound: Any) -> Any:
    """Returns the least and the largest element, and whether there is a NaN.

    ``low``, ``high`` and ``unsound`` are buffers of a lane each.
    """
    wide_vectors()
    low[:], high[:], unsound[:] = x[0], x[0], 0
    whole = x.size // _LANES * _LANES
    for first in range(0, whole, _LANES):
        part = x[first:first + _LANES]
        for j in range(_N(_LANES)):
            value = part[j]
            low[j] = value if value < low[j] else low[j]
            high[j] = value if value > high[j] else high[j]
            unsound[j] |= value != value
    for i in range(whole, x.size):
        value = x[i]
        low[0] = value if value < low[0] else low[0]
        high[0] = value if value > high[0] else high[0]
        unsound[0] |= value != value
    least, most, bad = low[0], high[0], unsound[0]
    for j in range(1, _LANES):
        least = low[j] if low[j] < least else least
        most = high[j] if high[j] > most else most
        bad |= unsound[j]
    return least, most, bad != 0


@jit
def _halved_sum(terms: Any) -> Any:
    """Sums a buffer, and overwrites it: the bits of ``tree_sum``. Its size is a power of two."""
    wide_vectors()
    half = terms.size // 2
    while half:
        upper = terms[half:2 * half]
        for i in range(_N(half)):
            terms[i] += upper[i]
        half //= 2
    return terms[0]


@jit
def _copy_and_count(x: Any, terms: Any, given: Any) -> Any:
    """Copies a chunk and pads it with zeros; returns the number of elements that are not zero."""
    wide_vectors()
    for i in range(_N(x.size)):
        terms[i] = x[i]
        given[i] = x[i] != 0
    terms[x.size:], given[x.size:] = 0, 0
    count = 0
    for i in range(_N(given.size)):
        count += given[i]
    return count


@jit
def _fill(begin: Any, end: Any, x: Any, row: Any, out: Any) -> None:
    """Fills the zeros of chunks ``begin .. end - 1``."""
    wide_vectors()
    terms, given = np.empty(CHUNK, x.dtype), np.empty(CHUNK, np.int32)
    low, high = np.empty(_LANES, x.dtype), np.empty(_LANES, x.dtype)
    unsound = np.empty(_LANES, np.int32)
    for number in range(begin, end):
        start, stop = _chunk(number, row)
        part, target = x[start:stop], out[start:stop]
        count = _copy_and_count(part, terms, given)
        mean = _halved_sum(terms) / x.dtype.type(max(count, 1))
        _, highest, bad = _extremes(part, low, high, unsound)
        # The sum of large elements may be infinite.
        mean = highest if mean > highest and not bad else mean
        for i in range(_N(part.size)):
            target[i] = part[i] if part[i] != 0 else mean


@jit
def _mask_bits(mask: Any, bit: Any, x: Any) -> None:
    wide_vectors()
    for j in range(_N(x.size)):
        x[j] *= x.dtype.type(np.int32(np.uint8(mask[j] >> bit) & np.uint8(1)))


@jit
def _mask(begin: Any, end: Any, mask: Any, x: Any) -> None:
    """Multiplies the elements of bytes ``begin .. end - 1`` of a mask by their bits."""
    n = mask.size
    for bit in range(8):
        last = min(end, x.size - bit * n)
        if last > begin:
            _mask_bits(mask[begin:last], np.uint8(bit), x[bit * n + begin:bit * n + last])


@inline
def _predicted(derivative: Any, c: Any) -> Any:
    # NaN is not above the least derivative. Missing coefficients are zero, and change nothing.
    number = type(c[0])
    cut = derivative if derivative > number(LEAST) else number(LEAST)
    t = (cut if cut < number(MOST) else number(MOST)) - number(CENTRE)
    return ((((t * c[4] + c[3]) * t + c[2]) * t + c[1]) * t + c[0]) * t


@jit
def _difference(x: Any, c: Any, out: Any) -> None:
    wide_vectors()
    for i in range(_N(x.size)):
        out[i] = x[i] - _predicted(out[i], c)


@jit
def _subtract(begin: Any, end: Any, x: Any, out: Any, c: Any, row: Any, used: Any) -> None:
    """Subtracts the prediction in chunks ``begin .. end - 1``; ``out`` holds the derivatives."""
    low, high = np.empty(_LANES, x.dtype), np.empty(_LANES, x.dtype)
    unsound = np.empty(_LANES, np.int32)
    for number in range(begin, end):
        start, stop = _chunk(number, row)
        part, target = x[start:stop], out[start:stop]
        _difference(part, c, target)
        least, most, bad = _extremes(part, low, high, unsound)
        lower, upper, _ = _extremes(target, low, high, unsound)
        used[number] = not bad and upper - lower < most - least
        if not used[number]:
            target[:] = part


@jit
def _sum(derivative: Any, c: Any, x: Any) -> None:
    wide_vectors()
    for i in range(_N(x.size)):
        x[i] += _predicted(derivative[i], c)


@jit
def _add(begin: Any, end: Any, derivative: Any, c: Any, row: Any, used: Any, x: Any) -> None:
    """Adds the prediction in chunks ``begin .. end - 1``."""
    for number in range(begin, end):
        if used[number]:
            start, stop = _chunk(number, row)
            _sum(derivative[start:stop], c, x[start:stop])


def fill_zeros(x: Tensor, row: int) -> Tensor:
    """See :func:`brevitas_bp.format.differences.fill_zeros`."""
    out = torch.empty_like(x)
    run_in_pool(
        _fill, (), 0, chunk_count(x.numel(), row), CHUNK, (x.numpy(), row, out.numpy()))
    return out


def mask_(x: Tensor, mask: Tensor) -> Tensor:
    """See :func:`brevitas_bp.format.differences.mask_`."""
    run_in_pool(_mask, (), 0, mask.numel(), 8, (mask.numpy(), x.numpy()))
    return x


def subtract_prediction(
        x: Tensor, derivative: Tensor, prediction: Prediction, row: int) -> tuple[Tensor, Tensor]:
    """See :func:`brevitas_bp.format.differences.subtract_prediction`."""
    count = chunk_count(x.numel(), row)
    used = torch.empty(count, dtype=torch.bool, device="cpu")
    run_in_pool(_subtract, (), 0, count, CHUNK, (
        x.numpy(), derivative.numpy(), _coefficients(x, prediction), row, used.numpy()))
    return derivative, used


def add_prediction_(
        x: Tensor, derivative: Tensor, prediction: Prediction, row: int, used: Tensor) -> Tensor:
    """See :func:`brevitas_bp.format.differences.add_prediction_`."""
    run_in_pool(_add, (), 0, chunk_count(x.numel(), row), CHUNK, (
        derivative.numpy(), _coefficients(x, prediction), row, used.numpy(), x.numpy()))
    return x


def _coefficients(x: Tensor, prediction: Prediction) -> tuple[Any, ...]:
    """Returns five coefficients."""
    number = np.float64 if x.dtype == torch.float64 else np.float32
    given = prediction.coefficients
    return tuple(number(c) for c in (*given, *[0.0] * (5 - len(given))))
