"""Means of groups of neighbours: the definition, in torch operations.

A group of ``k`` values has the mean ``(x[0] + x[1] + ... + x[k-1]) / k``, added in this order in float64
and rounded to float32 at the end. So a constant group is exact, values near the largest float do not
overflow, and every backend gives the same bits. Of float64 data ``x[0]/k + x[1]/k + ...`` is limited to
the range of the group, to the same ends. NaN and Inf give NaN or Inf in their own group.
"""

import torch
from torch import Tensor

from brevitas_bp.format.arithmetic import compute_dtype

# Elements of a CPU tensor handled at once, so that float64 temporaries stay in the cache. Elsewhere a
# launch costs more than memory.
_CHUNK, _LARGE_CHUNK = 1 << 17, 1 << 25


def group_count(length: int, size: int) -> int:
    """Groups of ``size`` neighbours among ``length``, the last one perhaps smaller."""
    return -(-length // size)


def means(x: Tensor, size: int) -> Tensor:
    """Means of groups along the middle dimension; differentiable.

    Args:
        x: [A, L, I], any float dtype.
        size: elements of a group; the last one of a row may be smaller.

    Returns:
        [A, ceil(L / size), I] in float32 (float64 for float64).
    """
    whole = x.shape[1] // size * size
    parts = []
    if whole:
        parts.append(_mean(x[:, :whole].unflatten(1, (-1, size))))
    if whole < x.shape[1]:
        parts.append(_mean(x[:, whole:].unsqueeze(1)))
    return torch.cat(parts, 1) if parts else x.to(compute_dtype(x.dtype))


def _mean(groups: Tensor) -> Tensor:
    """[A, n, k, I] -> [A, n, I]."""
    count = groups.shape[2]
    if groups.dtype == torch.float64:
        return _mean_of_double(groups, count)
    total = groups[:, :, 0].to(torch.float64)
    for i in range(1, count):
        total = total + groups[:, :, i]
    return (total / count).to(torch.float32)


def _mean_of_double(groups: Tensor, count: int) -> Tensor:
    total = groups[:, :, 0] / count
    for i in range(1, count):
        total = total + groups[:, :, i] / count
    lowest, highest = groups.detach().aminmax(dim=2)
    return total.clamp(lowest, highest)


def spread(means: Tensor, size: int, length: int) -> Tensor:
    """Repeats each mean for its group: [A, ceil(L / size), I] -> [A, L, I]; differentiable."""
    if size == 1 or length <= 1:
        return means
    return means.repeat_interleave(size, 1)[:, :length]


def group_means(x: Tensor, size: int) -> Tensor:
    """As :func:`means`, for large tensors: in chunks, without a graph."""
    rows, length, inner = x.shape
    out = x.new_empty(
        (rows, group_count(length, size), inner), dtype=compute_dtype(x.dtype))
    chunk = _CHUNK if x.device.type == "cpu" else _LARGE_CHUNK
    # Whole groups of a row, and as many rows as make a chunk.
    step = max(1, chunk // max(size * inner, 1))
    height = max(1, chunk // max(length * inner, 1))
    for row in range(0, rows, height):
        for first in range(0, out.shape[1], step):
            part = x[row:row + height, first * size:(first + step) * size]
            out[row:row + height, first:first + step] = means(part, size)
    return out
