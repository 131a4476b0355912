"""Fast forms of :mod:`brevitas_bp.format.differences` for CPU tensors, compiled by numba.

Extremes are taken on the integer form of floats, because compilers turn only that into vector code.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from brevitas_bp.activations.predictions import CENTRE, LEAST, MOST, Prediction
from brevitas_bp.format.differences import CHUNK, chunk_count, in_pieces
from brevitas_bp.format.masks import INTEGERS
from brevitas_bp.kernels.cpu.compiling import inline, jit, wide_vectors, window
from brevitas_bp.kernels.cpu.metadata import extremes, tree_sum
from brevitas_bp.kernels.cpu.threads import run_in_pool

_N = np.uint64


@jit
def _place(number: Any, row: Any, chunk: Any) -> Any:
    """Returns the first element of a chunk, and its size."""
    per_row = (row + chunk - 1) // chunk
    first = number // per_row * row
    start = first + number % per_row * chunk
    return start, min(chunk, first + row - start)


@jit
def _extremes(x: Any, words: Any, ends: Any) -> Any:
    """Returns the least and the largest element; one of them is NaN if any element is.

    Args:
        x: floats.
        words: the same memory, as integers.
        ends: a buffer of two integers.
    """
    ends[0], ends[1] = extremes(words)
    for i in range(2):
        # Back from the form that sorts like the floats.
        ends[i] ^= (ends[i] >> (np.iinfo(ends.dtype).bits - 1)) & np.iinfo(ends.dtype).max
    found = ends.view(x.dtype)
    return found[0], found[1]


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
def _fill(begin: Any, end: Any, x: Any, words: Any, row: Any, out: Any) -> None:
    """Fills the zeros of chunks ``begin .. end - 1``; ``words`` is the memory of ``x``, as integers."""
    wide_vectors()
    terms, given = np.empty(CHUNK, x.dtype), np.empty(CHUNK, np.int32)
    ends = np.empty(2, words.dtype)
    for number in range(begin, end):
        start, size = _place(number, row, CHUNK)
        part, target = window(x, start, size), window(out, start, size)
        # More zeros would not change the sum.
        wide = CHUNK
        while wide // 2 >= size:
            wide //= 2
        padded = window(terms, 0, wide)
        count = _copy_and_count(part, padded, window(given, 0, wide))
        mean = tree_sum(padded) / x.dtype.type(max(count, 1))
        _, highest = _extremes(part, window(words, start, size), ends)
        # The sum of large elements may be infinite.
        mean = highest if mean > highest else mean
        mean = mean if mean < np.inf else x.dtype.type(0)
        for i in range(_N(size)):
            target[i] = part[i] if part[i] != 0 else mean


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
def _span(x: Any, words: Any, factors: Any, scaled: Any, scaled_words: Any, ends: Any) -> Any:
    """Returns the range of a chunk times its factors, if there are any; NaN if any element is.

    ``scaled`` and ``scaled_words`` are one buffer, as floats and as integers.
    """
    wide_vectors()
    if factors.size == 0:
        least, most = _extremes(x, words, ends)
        return most - least
    for i in range(_N(x.size)):
        scaled[i] = x[i] * factors[i]
    least, most = _extremes(scaled[:x.size], scaled_words[:x.size], ends)
    return most - least


@jit
def _subtract(
        begin: Any, end: Any, x: Any, out: Any, words: Any, words_out: Any, factors: Any, c: Any,
        row: Any, chunk: Any, used: Any) -> None:
    """Subtracts the prediction in chunks ``begin .. end - 1``.

    ``out`` holds the derivatives. ``words`` and ``words_out`` are the memory of ``x`` and ``out``, as
    integers. ``factors`` are those of a row, or none.
    """
    scaled_words = np.empty(min(row, chunk) if factors.size else 0, words.dtype)
    ends = np.empty(2, words.dtype)
    scaled = scaled_words.view(x.dtype)
    for number in range(begin, end):
        start, size = _place(number, row, chunk)
        part, target = window(x, start, size), window(out, start, size)
        own = window(factors, start % row, size) if factors.size else factors
        _difference(part, c, target)
        before = _span(part, window(words, start, size), own, scaled, scaled_words, ends)
        after = _span(target, window(words_out, start, size), own, scaled, scaled_words, ends)
        used[number] = after < before
        if not used[number]:
            target[:] = part


@jit
def _sum(derivative: Any, c: Any, x: Any) -> None:
    wide_vectors()
    for i in range(_N(x.size)):
        x[i] += _predicted(derivative[i], c)


@jit
def _add(
        begin: Any, end: Any, derivative: Any, c: Any, row: Any, chunk: Any, used: Any,
        x: Any) -> None:
    """Adds the prediction in chunks ``begin .. end - 1``."""
    for number in range(begin, end):
        if used[number]:
            start, size = _place(number, row, chunk)
            _sum(window(derivative, start, size), c, window(x, start, size))


def fill_zeros(x: Tensor, row: int, strays: Tensor | None = None) -> Tensor:
    """See :func:`brevitas_bp.format.differences.fill_zeros`."""
    return in_pieces(_filled, x, row) if strays is None or not strays.item() else x


def _filled(x: Tensor, row: int) -> Tensor:
    out = torch.empty_like(x)
    run_in_pool(
        _fill, (), 0, chunk_count(x.numel(), row), CHUNK, (
            x.numpy(), _words(x), row, out.numpy()))
    return out


def subtract_prediction(
        x: Tensor, derivative: Tensor, prediction: Prediction, row: int,
        factors: Tensor | None = None, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """See :func:`brevitas_bp.format.differences.subtract_prediction`."""
    count = chunk_count(x.numel(), row, chunk)
    used = torch.empty(count, dtype=torch.bool, device="cpu")
    given = x.new_empty(0) if factors is None else factors.to(x.dtype)
    run_in_pool(_subtract, (), 0, count, min(row, chunk), (
        x.numpy(), derivative.numpy(), _words(x), _words(derivative), given.numpy(),
        _coefficients(x, prediction), row, chunk, used.numpy()))
    return derivative, used


def add_prediction_(
        x: Tensor, derivative: Tensor, prediction: Prediction, row: int, used: Tensor,
        chunk: int = CHUNK) -> Tensor:
    """See :func:`brevitas_bp.format.differences.add_prediction_`."""
    run_in_pool(_add, (), 0, chunk_count(x.numel(), row, chunk), min(row, chunk), (
        derivative.numpy(), _coefficients(x, prediction), row, chunk, used.numpy(), x.numpy()))
    return x


def _words(x: Tensor) -> Any:
    return x.view(INTEGERS[x.element_size()]).numpy()


def _coefficients(x: Tensor, prediction: Prediction) -> tuple[Any, ...]:
    """Returns five coefficients."""
    number = np.float64 if x.dtype == torch.float64 else np.float32
    return tuple(number(c) for c in prediction.five)
