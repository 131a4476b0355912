"""Average Quantization: groups of neighbours share one code."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from brevitas_bp.core.bucket import memory_order, unflatten
from brevitas_bp.format import averages
from brevitas_bp.format.arithmetic import compute_dtype


def check_average_size(where: str, size: Any) -> int:
    """Returns ``size`` if it is a positive int, or raises."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f"{where}: average_size must be a positive integer, the number of elements that share one "
            f"code, got {size!r}; 1 averages nothing")
    return size


# NOTE [ Groups are logical, wherever they lie in memory ]
# A group is `average_size` neighbours along the last dimension as the user indexes it: the width of an
# NCHW image, or the features of a linear layer. In channels_last memory, these neighbours are C
# elements apart, and are read there without a copy of the tensor.
# Groups along memory would be groups of channels. The same image would get other values, and the
# channels of an image are less alike than its pixels. The means are stored in logical order, so both
# memory formats decode to the same values.


Kernel = Callable[[Tensor, int], Tensor]
Repeat = Callable[[Tensor, int, int], Tensor]


def group_means(x: Tensor, size: int, kernel: Kernel = averages.means) -> Tensor:
    """Computes the means of groups of ``size`` neighbours along the last dimension.

    The last group may have fewer elements.

    Args:
        x: [..., L], any layout in memory; a 0-d tensor counts as one element.
        size: elements of a group.
        kernel: computes the means of contiguous [A, L, I] along the middle dimension.

    Returns:
        [..., ceil(L / size)], contiguous, in float32 (float64 for float64).

    >>> group_means(torch.arange(7.0), 4).tolist()
    [1.5, 5.0]
    """
    if x.dim() == 0:
        x = x.reshape(1)
    order = memory_order(x) or list(range(x.dim()))
    means = kernel(_around(x.permute(order), order.index(x.dim() - 1)), size)
    shape = [means.shape[1] if d == x.dim() - 1 else x.shape[d] for d in order]
    inverse = [order.index(d) for d in range(len(order))]
    return means.view(shape).permute(inverse).contiguous()


def spread(
        means: Tensor, size: int, length: int, order: list[int] | None,
        kernel: Repeat = averages.spread) -> Tensor:
    """Repeats each mean for its group, and returns a flat tensor with its elements in memory order.

    Args:
        means: [..., ceil(L / size)].
        size: elements of a group.
        length: L.
        order: dimensions from the slowest to the fastest in memory; None keeps their own order.
        kernel: repeats contiguous [A, ceil(L / size), I] along the middle dimension.
    """
    order = order or list(range(means.dim()))
    return kernel(
        _around(means.permute(order), order.index(means.dim() - 1)), size, length).reshape(-1)


def _around(x: Tensor, place: int) -> Tensor:
    """Merges the dimensions before ``place``, and those after it: returns [A, shape[place], I]."""
    shape = x.shape
    return x.reshape(prod(shape[:place]), shape[place], prod(shape[place + 1:])).contiguous()


class AverageQuant(nn.Module):
    """Quantizes the means of groups of neighbours with a bucket quantizer. Fills ``tensor_quant``.

    ``x~[i] = Q(mean of the group of i)``. A group is ``g`` neighbours along the last dimension (the
    width of NCHW, the features of a linear layer; see NOTE [ Groups are logical, wherever they lie in
    memory ]). A group never crosses the end of that dimension. The last group has the rest.

    An element therefore takes ``bit_width / g`` bits, and more if the length of the last dimension is
    not a multiple of ``g``. A last dimension of 1 is not averaged.

    **Biased for elements**: with stochastic rounding, ``E[x~]`` is the mean of the group, not ``x``.
    The sum over a group is unbiased. Independent data lose the share ``1 - 1/g`` of their variance;
    smooth data lose less.

    The gradient of a weight is the gradient for the averaged input: each feature (pixel) of a group
    gets the mean of the group. The gradient of this module's input is averaged too: it is the mean over
    each group of the gradient of the output.

    NaN or Inf spreads to the bucket of its group's mean. Empty tensors are returned as they are.

    Args:
        bucket_quant: quantizes the means.
        average_size: elements of a group, g.

    Raises:
        ValueError: ``average_size`` is not a positive integer.

    Source: "Average Quantization: High-Quality 0.x-bit Activation" (OpenReview BG7H1XsMG0), later ALAM,
    2024. In that work, groups run over the flattened tensor.
    """

    def __init__(self, bucket_quant: nn.Module, average_size: int) -> None:
        super().__init__()
        self.bucket_quant = bucket_quant
        self.average_size = check_average_size("brevitas_bp.core.AverageQuant", average_size)
        self.observer_only = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns values shaped like ``x``, and scale, zero point and width of the means' buckets."""
        if x.numel() == 0:
            return self.bucket_quant(x)
        means, *metadata = self.bucket_quant(
            group_means(x.to(compute_dtype(x.dtype)), self.average_size))
        value = x if self.observer_only else self.restore(means, x)
        return value, *metadata

    def restore(self, means: Tensor, like: Tensor) -> Tensor:
        """Repeats ``means`` for each element, with the shape, dtype and memory layout of ``like``."""
        length = like.shape[-1] if like.dim() else 1
        flat = spread(
            to_dtype(means, like.dtype), self.average_size, length, memory_order(like))
        return unflatten(flat, like)

    def extra_repr(self) -> str:
        return f"average_size={self.average_size}"


def to_dtype(means: Tensor, dtype: torch.dtype) -> Tensor:
    """Clamps ``means`` to the finite range of ``dtype`` and converts them."""
    if means.dtype == dtype:
        return means
    limit = torch.finfo(dtype).max
    return means.clamp(-limit, limit).to(dtype)
