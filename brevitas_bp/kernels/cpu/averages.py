"""Fast forms of :mod:`brevitas_bp.format.averages` for CPU tensors, by numba; memory is read once.

Indices are unsigned: numba checks each signed index for negative values. Sizes of groups that are known
at compile time (the usual sizes) are passed as constants to inlined functions.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from brevitas_bp.format import averages
from brevitas_bp.format.averages import group_count
from brevitas_bp.kernels.cpu.compiling import inline, jit
from brevitas_bp.kernels.cpu.threads import run_in_pool

# Elements converted at once if the input is not float32.
_CHUNK = 1 << 20
# Repeating only moves bits, so words of the element size serve all dtypes.
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

_D, _F, _N = np.float64, np.float32, np.uint64
_1, _2, _3, _4, _8 = _N(1), _N(2), _N(3), _N(4), _N(8)
# Elements of rows that are read again for each group of a row, while they are in the first-level cache.
_BLOCK = _N(4096)


@inline
def _mean(x: Any, start: Any, count: Any) -> Any:
    total = _D(x[start])
    for i in range(count - _1):
        total += _D(x[start + _1 + i])
    return _F(total / _D(np.int64(count)))


@inline
def _means_of(x: Any, begin: Any, end: Any, size: Any, out: Any) -> None:
    for group in range(begin, end):
        out[group] = _mean(x, group * size, size)


@jit
def _whole_means(x: Any, begin: Any, end: Any, size: Any, out: Any) -> None:
    """Averages groups ``begin .. end - 1``, all of full size."""
    begin, end, size = _N(begin), _N(end), _N(size)
    if size == _2:
        _means_of(x, begin, end, _2, out)
    elif size == _4:
        _means_of(x, begin, end, _4, out)
    elif size == _8:
        _means_of(x, begin, end, _8, out)
    else:
        _means_of(x, begin, end, size, out)


@inline
def _column_of(
        x: Any, begin: Any, end: Any, length: Any, first: Any, count: Any, n: Any, place: Any,
        out: Any) -> None:
    for row in range(begin, end):
        out[row * n + place] = _mean(x, row * length + first, count)


@jit
def _column(
        x: Any, begin: Any, end: Any, length: Any, first: Any, count: Any, n: Any, place: Any,
        out: Any) -> None:
    """Averages one group of each row. All these groups are equally large: no branch is mispredicted."""
    if count == _1:
        _column_of(x, begin, end, length, first, _1, n, place, out)
    elif count == _2:
        _column_of(x, begin, end, length, first, _2, n, place, out)
    elif count == _3:
        _column_of(x, begin, end, length, first, _3, n, place, out)
    elif count == _4:
        _column_of(x, begin, end, length, first, _4, n, place, out)
    elif count == _8:
        _column_of(x, begin, end, length, first, _8, n, place, out)
    else:
        _column_of(x, begin, end, length, first, count, n, place, out)


@jit
def _row_means(x: Any, begin: Any, end: Any, length: Any, size: Any, out: Any) -> None:
    """Averages rows ``begin .. end - 1``, whose last group is smaller."""
    begin, end, length, size = _N(begin), _N(end), _N(length), _N(size)
    n = (length + size - _1) // size
    while begin < end:
        stop = min(end, begin + max(_1, _BLOCK // length))
        for place in range(n):
            first = place * size
            _column(x, begin, stop, length, first, min(size, length - first), n, place, out)
        begin = stop


@jit
def _vector_means(
        x: Any, begin: Any, end: Any, length: Any, size: Any, inner: Any, out: Any) -> None:
    """Averages rows ``begin .. end - 1`` of vectors."""
    begin, end, length, size, inner = _N(begin), _N(end), _N(length), _N(size), _N(inner)
    n = (length + size - _1) // size
    total = np.empty(inner, _D)
    for group in range(begin * n, end * n):
        first = group % n * size
        count = min(size, length - first)
        start = (group // n * length + first) * inner
        for i in range(inner):
            total[i] = _D(x[start + i])
        for j in range(count - _1):
            for i in range(inner):
                total[i] += _D(x[start + (j + _1) * inner + i])
        for i in range(inner):
            out[group * inner + i] = _F(total[i] / _D(np.int64(count)))


@inline
def _fill(words: Any, begin: Any, end: Any, length: Any, size: Any, out: Any) -> None:
    whole, n = length // size, (length + size - _1) // size
    for row in range(begin, end):
        for j in range(whole):
            word = words[row * n + j]
            for i in range(size):
                out[row * length + j * size + i] = word
        if whole < n:
            word = words[row * n + whole]
            for i in range(length - whole * size):
                out[row * length + whole * size + i] = word


@jit
def _spread(words: Any, begin: Any, end: Any, length: Any, size: Any, out: Any) -> None:
    """Writes each mean of rows ``begin .. end - 1`` for all its elements."""
    begin, end, length, size = _N(begin), _N(end), _N(length), _N(size)
    if size == _2:
        _fill(words, begin, end, length, _2, out)
    elif size == _4:
        _fill(words, begin, end, length, _4, out)
    elif size == _8:
        _fill(words, begin, end, length, _8, out)
    else:
        _fill(words, begin, end, length, size, out)


@jit
def _spread_vectors(
        words: Any, begin: Any, end: Any, length: Any, size: Any, inner: Any, out: Any) -> None:
    """Works like :func:`_spread`, on rows of vectors."""
    begin, end, length, size, inner = _N(begin), _N(end), _N(length), _N(size), _N(inner)
    n = (length + size - _1) // size
    for row in range(begin, end):
        for j in range(length):
            for i in range(inner):
                out[(row * length + j) * inner + i] = words[(row * n + j // size) * inner + i]


def group_means(x: Tensor, size: int) -> Tensor:
    """See :func:`brevitas_bp.format.averages.group_means`; ``x`` is contiguous."""
    if x.dtype == torch.float64:
        return averages.group_means(x, size)
    rows, length, inner = x.shape
    n = group_count(length, size)
    out = torch.empty((rows, n, inner), dtype=torch.float32)
    if out.numel() == 0:
        return out
    height = rows if x.dtype == torch.float32 else max(1, _CHUNK // (length * inner))
    for row in range(0, rows, height):
        part = x[row:row + height]
        values = part.to(torch.float32).numpy().reshape(-1)
        target = out[row:row + height].numpy().reshape(-1)
        count = part.shape[0]
        if inner > 1:
            run_in_pool(
                _vector_means, (values,), 0, count, length * inner, (length, size, inner, target))
        elif length % size == 0:
            run_in_pool(_whole_means, (values,), 0, count * n, size, (size, target))
        else:
            run_in_pool(_row_means, (values,), 0, count, length, (length, size, target))
    return out


def spread(means: Tensor, size: int, length: int) -> Tensor:
    """See :func:`brevitas_bp.format.averages.spread`; ``means`` is contiguous."""
    rows, _, inner = means.shape
    out = torch.empty((rows, length, inner), dtype=means.dtype)
    if out.numel() == 0:
        return out
    word = _WORDS[means.element_size()]
    words, target = (t.view(-1).view(word).numpy() for t in (means, out))
    if inner > 1:
        shared = (length, size, inner, target)
        run_in_pool(_spread_vectors, (words,), 0, rows, length * inner, shared)
    else:
        run_in_pool(_spread, (words,), 0, rows, length, (length, size, target))
    return out
