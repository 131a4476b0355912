"""Fast form of :mod:`brevitas_bp.kernels.averages` for CPU tensors: one pass, compiled by numba."""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from brevitas_bp.kernels import averages
from brevitas_bp.kernels.averages import group_count
from brevitas_bp.kernels.cpu import _run

# Elements converted at once where the input is not float32.
_CHUNK = 1 << 20

_D = np.float64
_jit = numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

# The usual sizes are written out, which the compiler turns into vector code.


@_jit
def _means_of_2(x: Any, out: Any) -> None:
    for j in range(out.size):
        out[j] = np.float32((_D(x[2 * j]) + _D(x[2 * j + 1])) / _D(2))


@_jit
def _means_of_4(x: Any, out: Any) -> None:
    for j in range(out.size):
        total = _D(x[4 * j]) + _D(x[4 * j + 1])
        out[j] = np.float32((total + _D(x[4 * j + 2]) + _D(x[4 * j + 3])) / _D(4))


@_jit
def _means_of_8(x: Any, out: Any) -> None:
    for j in range(out.size):
        total = _D(x[8 * j]) + _D(x[8 * j + 1])
        total = total + _D(x[8 * j + 2]) + _D(x[8 * j + 3])
        total = total + _D(x[8 * j + 4]) + _D(x[8 * j + 5])
        out[j] = np.float32((total + _D(x[8 * j + 6]) + _D(x[8 * j + 7])) / _D(8))


@_jit
def _means_of(x: Any, out: Any, size: Any) -> None:
    """Neighbours in memory; only the last group may be smaller."""
    for j in range(out.size):
        last = min(x.size, (j + 1) * size)
        total = _D(x[j * size])
        for i in range(j * size + 1, last):
            total += _D(x[i])
        out[j] = np.float32(total / _D(last - j * size))


@_jit
def _means_apart(x: Any, out: Any, inner: Any) -> None:
    """Group of ``x.size // inner`` vectors, element by element."""
    count = x.size // inner
    for i in range(inner):
        total = _D(x[i])
        for j in range(1, count):
            total += _D(x[j * inner + i])
        out[i] = np.float32(total / _D(count))


@_jit
def _group_means(
        x: Any, begin: Any, end: Any, length: Any, size: Any, inner: Any, out: Any) -> None:
    """Groups ``begin .. end - 1`` of all rows."""
    n = (length + size - 1) // size
    if inner > 1:
        for group in range(begin, end):
            start = group // n * length + group % n * size
            stop = min(start + size, (group // n + 1) * length)
            _means_apart(
                x[start * inner:stop * inner], out[group * inner:(group + 1) * inner], inner)
        return
    group = begin
    while group < end:
        # As far as neighbours in memory are neighbours in their row.
        until = end if length % size == 0 else min(end, (group // n + 1) * n)
        start = group // n * length + group % n * size
        stop = min(start + (until - group) * size, (((until - 1) // n) + 1) * length)
        values, target = x[start:stop], out[group:until]
        if values.size != target.size * size:
            _means_of(values, target, size)
        elif size == 2:
            _means_of_2(values, target)
        elif size == 4:
            _means_of_4(values, target)
        elif size == 8:
            _means_of_8(values, target)
        else:
            _means_of(values, target, size)
        group = until


def group_means(x: Tensor, size: int) -> Tensor:
    """See :func:`brevitas_bp.kernels.averages.group_means`; ``x`` is contiguous."""
    if x.dtype == torch.float64:
        return averages.group_means(x, size)
    rows, length, inner = x.shape
    n = group_count(length, size)
    out = torch.empty((rows, n, inner), dtype=torch.float32)
    if out.numel() == 0:
        return out
    height = rows if x.dtype == torch.float32 else max(1, _CHUNK // (length * inner))
    for row in range(0, rows, height):
        part, target = x[row:row + height], out[row:row + height]
        _run(
            _group_means, (part.to(torch.float32).numpy().reshape(-1),), 0, part.shape[0] * n,
            size * inner, (length, size, inner, target.numpy().reshape(-1)))
    return out
