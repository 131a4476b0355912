"""Means of groups of neighbours: the definition, in torch operations.

A group of ``k`` values has the mean ``(x[0] + x[1] + ... + x[k-1]) / k``. The values are added in this
order in float64, and the result is rounded to float32. This has three effects:

* A constant group is exact.
* Values near the largest float do not overflow.
* Every backend gives the same bits.

The mean of float64 data is ``x[0]/k + x[1]/k + ...``, limited to the range of the group, which has the
same effects. NaN and Inf give NaN or Inf in their own group.
"""

import torch
from torch import Tensor

from brevitas_bp.format.arithmetic import compute_dtype

# Elements handled at once. On CPU, the float64 temporaries then stay in the cache. On other devices, a
# launch costs more than memory.
_CHUNK, _LARGE_CHUNK = 1 << 17, 1 << 25


def group_count(length: int, size: int) -> int:
    """Returns how many groups of ``size`` neighbours ``length`` has; the last group may be smaller."""
    return -(-length // size)


def means(x: Tensor, size: int) -> Tensor:
    """Computes the means of groups along the middle dimension; differentiable.

    Args:
        x: [A, L, I], any float dtype.
        size: elements of a group; the last group along the dimension may be smaller.

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
    """Averages over the third dimension: [A, n, k, I] -> [A, n, I]."""
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
    """Computes :func:`means` of a large tensor in chunks, without an autograd graph."""
    rows, length, inner = x.shape
    out = x.new_empty(
        (rows, group_count(length, size), inner), dtype=compute_dtype(x.dtype))
    chunk = _CHUNK if x.device.type == "cpu" else _LARGE_CHUNK
    # A chunk takes whole groups, and as many entries of the first dimension as fit.
    step = max(1, chunk // max(size * inner, 1))
    height = max(1, chunk // max(length * inner, 1))
    for row in range(0, rows, height):
        for first in range(0, out.shape[1], step):
            part = x[row:row + height, first * size:(first + step) * size]
            out[row:row + height, first:first + step] = means(part, size)
    return out
