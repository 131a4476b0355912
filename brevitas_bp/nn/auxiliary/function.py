"""The autograd Function of all auxiliary layers: it saves an auxiliary tensor, not the input."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from brevitas_bp.errors import SecondDerivativeError
from brevitas_bp.nn.auxiliary.maps import Gradients, LinearMap


class Auxiliary(Protocol):
    """What a layer takes for its input in backward."""

    @property
    def factor(self) -> float:
        """The gradient of the weight is multiplied by it."""
        ...

    def restored(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Returns the auxiliary tensor from the tensors that were saved for it."""
        ...


class _WithAuxiliary(torch.autograd.Function):
    """``y = f(x + a, weight) + bias``; backward takes the auxiliary tensor for the input of ``f``.

    NOTE [ What an auxiliary layer saves ]
    1. It saves the weight, and the tensors ``stored``, through ``save_for_backward``. It does not save
       ``x``. So all that holds for tensors saved by autograd holds here too: hooks see them, reports
       count them, they are freed after backward, and an in-place change raises an error.
    2. The layers of a run pass the same tensors as ``stored``. Autograd keeps references, so the run
       stores one tensor. It is freed when backward has passed the first layer of the run.
    3. No tensor is held in any other way: an attribute of ``ctx`` would live until the loss is freed.
    """

    @staticmethod
    def forward(
            x: Tensor, weight: Tensor, bias: Tensor | None, linear_map: LinearMap,
            auxiliary: Auxiliary, entering: Tensor | None, *stored: Tensor) -> Tensor:
        """Computes the output as the ordinary layer does."""
        return linear_map(x if entering is None else entering, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Saves the weight and the auxiliary tensors."""
        x, weight, bias, ctx.linear_map, ctx.auxiliary, _, *stored = inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.count = len(stored)
        ctx.save_for_backward(weight, *stored)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Returns the gradients; those of weight and bias are in the dtype of the output, then cast.

        Under autocast the output has a shorter dtype than the weight. The ordinary layer computes its
        gradients in that dtype too.
        """
        grad = grads[0]
        weight, *stored = ctx.saved_tensors
        needed = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        with torch.no_grad():
            found = _gradients(ctx, grad, weight, stored, needed)
        if torch.is_grad_enabled():
            # A graph of backward is being made: nobody may go through it here.
            found = Gradients(*(g if g is None else _OnlyOnce.apply(g, grad, weight) for g in found))
        return *found, None, None, None, *[None] * ctx.count


def _gradients(
        ctx: Any, grad: Tensor, weight: Tensor, stored: Sequence[Tensor],
        needed: tuple[bool, bool, bool]) -> Gradients:
    """Returns the gradients, in the dtypes of input, weight and bias."""
    a = ctx.auxiliary.restored(stored, grad.dtype).to(grad.dtype) if needed[1] else None
    found = ctx.linear_map.gradients(grad, a, weight.to(grad.dtype), ctx.shape, needed)
    dtypes = ctx.dtype, weight.dtype, ctx.bias_dtype
    of_x, of_weight, of_bias = (g if g is None else g.to(d) for g, d in zip(found, dtypes))
    if of_weight is not None and ctx.auxiliary.factor != 1:
        of_weight = of_weight * ctx.auxiliary.factor
    return Gradients(of_x, of_weight, of_bias)


class _OnlyOnce(torch.autograd.Function):
    """Returns a gradient as it is, and refuses to be differentiated."""

    @staticmethod
    def forward(gradient: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise SecondDerivativeError(
            "brevitas_bp.nn: a gradient that went through an auxiliary layer is differentiated, but the "
            "layer's gradient of the weight is an approximation, which has no meaningful derivative; "
            "use ordinary layers where you differentiate twice")


def apply(
        x: Tensor, layer: nn.Conv2d | nn.Linear, linear_map: LinearMap, auxiliary: Auxiliary,
        stored: Sequence[Tensor], entering: Tensor | None = None) -> Tensor:
    """Runs a layer that saves an auxiliary tensor.

    Args:
        x: input of the layer, to which its gradient goes.
        layer: the layer.
        linear_map: what the layer computes.
        auxiliary: makes the auxiliary tensor of what is stored.
        stored: tensors to save.
        entering: the tensor that enters the linear map; None: ``x``.
    """
    output: Any = _WithAuxiliary.apply(
        x, layer.weight, layer.bias, linear_map, auxiliary, entering, *stored)
    return output
