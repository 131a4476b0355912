"""The two linear maps that auxiliary layers use, and their gradients at another input.

Each map computes ``y = f(x, weight) + bias``. Its ``gradients`` take the stored auxiliary tensor in the
place of ``x``. The gradient of ``x`` does not depend on ``x``, so it is exact.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Gradients(NamedTuple):
    """Gradients of input, weight and bias; None for those that nobody asked for."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class LinearMap(Protocol):
    """A map that is linear in its input and in its weight."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns the output, as the ordinary layer computes it."""
        ...

    def gradients(
            self, grad: Tensor, a: Tensor | None, weight: Tensor, shape: torch.Size,
            needed: tuple[bool, bool, bool]) -> Gradients:
        """Returns the gradients, with ``a`` in the place of the input.

        Args:
            grad: gradient of the output; the other tensors have its dtype.
            a: stands for the input, and has its shape; None if no gradient of the weight is needed.
            weight: the weight.
            shape: shape of the input.
            needed: whether the gradients of input, weight and bias are needed.
        """
        ...


@dataclass(frozen=True)
class Product:
    """The map of ``nn.Linear``: ``y = x W^T + b`` over the last dimension."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def gradients(
            self, grad: Tensor, a: Tensor | None, weight: Tensor, shape: torch.Size,
            needed: tuple[bool, bool, bool]) -> Gradients:
        rows = _rows(grad)
        of_x = grad @ weight if needed[0] else None
        of_weight = rows.t() @ _rows(a) if needed[1] and a is not None else None
        return Gradients(of_x, of_weight, rows.sum(0) if needed[2] else None)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


@dataclass(frozen=True)
class Convolution:
    """The map of ``nn.Conv2d``.

    Attributes:
        stride: as in ``nn.Conv2d``.
        padding: zeros on both sides of height and width.
        dilation: as in ``nn.Conv2d``.
        groups: as in ``nn.Conv2d``.
        pad: further padding before it, in the order of ``F.pad``; empty: none.
        mode: mode of ``pad``.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    pad: tuple[int, ...] = ()
    mode: str = "constant"

    @classmethod
    def of(cls, layer: nn.Conv2d) -> "Convolution":
        """Returns the map of a layer."""
        stride, dilation, groups = layer.stride, layer.dilation, layer.groups
        if layer.padding_mode != "zeros":
            # nn.Conv2d pads first, too.
            both = tuple(layer._reversed_padding_repeated_twice)
            return cls(stride, (0, 0), dilation, groups, both, layer.padding_mode)
        if not isinstance(layer.padding, str):
            return cls(stride, layer.padding, dilation, groups)
        if layer.padding == "valid":
            return cls(stride, (0, 0), dilation, groups)
        total = [d * (k - 1) for d, k in zip(dilation, layer.kernel_size)]
        left = tuple(t // 2 for t in total)
        # "same" puts an odd zero on the right and at the bottom.
        pad = (0, total[1] % 2, 0, total[0] % 2)
        return cls(stride, left, dilation, groups, pad if any(pad) else ())

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(
            self._padded(x), weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def gradients(
            self, grad: Tensor, a: Tensor | None, weight: Tensor, shape: torch.Size,
            needed: tuple[bool, bool, bool]) -> Gradients:
        if a is None:
            # Only its shape is read.
            a = grad.new_zeros(()).expand(shape)
        single = grad.dim() == 3
        if single:
            grad, a = grad.unsqueeze(0), a.unsqueeze(0)
        found: Any = torch.ops.aten.convolution_backward(
            grad, self._padded(a), weight, [weight.shape[0]] if needed[2] else None, self.stride,
            self.padding, self.dilation, False, (0, 0), self.groups, list(needed))
        of_x = self._unpadded(found[0]) if needed[0] else None
        if of_x is not None and single:
            of_x = of_x.squeeze(0)
        return Gradients(of_x, found[1] if needed[1] else None, found[2] if needed[2] else None)

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pad, mode=self.mode) if self.pad else x

    def _unpadded(self, grad: Tensor) -> Tensor:
        """Returns the gradient of a tensor from the gradient of the padded tensor."""
        # F.pad lists the last dimension first.
        for dim, left, right in zip((-1, -2), self.pad[::2], self.pad[1::2]):
            grad = _unpadded(grad, dim, left, right, self.mode)
        return grad


def _unpadded(grad: Tensor, dim: int, left: int, right: int, mode: str) -> Tensor:
    """Adds the gradients of the padding to the elements that were copied there."""
    size = grad.shape[dim] - left - right
    inner = grad.narrow(dim, left, size)
    if mode == "constant" or not (left or right):
        return inner
    inner = inner.clone()
    sources = _sources(size, left, right, mode)
    for start, copied in ((0, sources[:left]), (left + size, sources[left:])):
        if copied:
            index = torch.tensor(copied, device=grad.device)
            inner.index_add_(dim, index, grad.narrow(dim, start, len(copied)))
    return inner


def _sources(size: int, left: int, right: int, mode: str) -> list[int]:
    """Returns, for each padded element from left to right, the element that it copies.

    >>> [_sources(4, 2, 1, mode) for mode in ("reflect", "replicate", "circular")]
    [[2, 1, 2], [0, 0, 3], [2, 3, 0]]
    """
    if mode == "reflect":
        return [*range(left, 0, -1), *range(size - 2, size - 2 - right, -1)]
    if mode == "replicate":
        return [0] * left + [size - 1] * right
    return [*range(size - left, size), *range(right)]
