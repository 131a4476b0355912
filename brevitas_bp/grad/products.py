"""The products of linear layers and convolutions, and their gradients by the input."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """``y = x W^T``: x [..., in], W [out, in]."""

    def input_gradient(self, grad: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        """Returns ``grad W``, in the shape of x."""
        return grad.matmul(weight).view(shape)

    def batched(self, grad: Tensor) -> Tensor:
        """Returns the gradient with one row for each row of x: [rows, out]."""
        return grad.reshape(-1, grad.shape[-1])


@dataclass(frozen=True)
class Convolution:
    """A convolution, transposed or not, of an input [N, C, ...] or [C, ...].

    Attributes:
        dims: spatial dimensions, 1 to 3.
        transposed: whether it is a transposed convolution.
        stride: one number for each spatial dimension.
        padding: likewise.
        dilation: likewise.
        output_padding: likewise; zeros if not transposed.
        groups: number of groups of channels.
    """

    dims: int
    transposed: bool
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int

    def input_gradient(self, grad: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        """Returns the gradient by the input, whose shape is ``shape``."""
        batch = (1,) if len(shape) == self.dims + 1 else ()
        # Only the shape of the input counts.
        like = grad.new_empty(1).expand((*batch, *shape))
        result: Tensor = torch.ops.aten.convolution_backward(
            grad.view((*batch, *grad.shape)) if batch else grad, like, weight, None, self.stride,
            self.padding, self.dilation, self.transposed, self.output_padding, self.groups,
            (True, False, False))[0]
        return result[0] if batch else result

    def batched(self, grad: Tensor) -> Tensor:
        """Returns the gradient [N, C, ...]."""
        return grad.unsqueeze(0) if grad.dim() == self.dims + 1 else grad


Product = Linear | Convolution


@dataclass(frozen=True)
class Call:
    """A call of a product.

    Attributes:
        product: the product.
        x: its input; padded, if the call asks for ``padding="same"`` and the ends differ.
        weight: its weight.
        run: runs the call on an input like ``x``.
    """

    product: Product
    x: Tensor
    weight: Tensor
    run: Callable[[Tensor], Tensor]


def _linear(func: Any, input: Any, weight: Any, bias: Any = None) -> Call:
    return Call(Linear(), input, weight, lambda x: func(x, weight, bias))


def _convolution(dims: int) -> Callable[..., Call]:
    def call(
            func: Any, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
            dilation: Any = 1, groups: int = 1) -> Call:
        stride, dilation = _each(stride, dims), _each(dilation, dims)
        if isinstance(padding, str):
            # Do what torch does: pad the end that gets more by hand.
            total = [
                d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:])]
            if any(t % 2 for t in total):
                input = F.pad(input, [p for t in reversed(total) for p in (0, t % 2)])
            padding = [t // 2 for t in total]
        padding = _each(padding, dims)
        product = Convolution(dims, False, stride, padding, dilation, (0,) * dims, groups)
        return Call(
            product, input, weight,
            lambda x: func(x, weight, bias, stride, padding, dilation, groups))

    return call


def _transposed(dims: int) -> Callable[..., Call]:
    def call(
            func: Any, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
            output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Call:
        stride, padding, dilation, output_padding = (
            _each(n, dims) for n in (stride, padding, dilation, output_padding))
        product = Convolution(dims, True, stride, padding, dilation, output_padding, groups)
        return Call(
            product, input, weight,
            lambda x: func(x, weight, bias, stride, padding, output_padding, groups, dilation))

    return call


def _each(number: Any, dims: int) -> tuple[int, ...]:
    numbers = tuple(number) if isinstance(number, (tuple, list)) else (number,)
    return numbers * dims if len(numbers) == 1 else numbers


#: Function of torch -> what binds its arguments.
CALLS: dict[Any, Callable[..., Call]] = {
    F.linear: _linear,
    F.conv1d: _convolution(1), F.conv2d: _convolution(2), F.conv3d: _convolution(3),
    F.conv_transpose1d: _transposed(1), F.conv_transpose2d: _transposed(2),
    F.conv_transpose3d: _transposed(3)}
