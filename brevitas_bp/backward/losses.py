"""Losses of two tensors, element by element: backward is linear in the derivative by the first one."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from brevitas_bp.backward.rewrites import (
    SMALLEST,
    RunningPass,
    Substitution,
    refuse_second_derivative,
)
from brevitas_bp.backward.saved import DERIVATIVE, SIGN, Call, is_ordinary, tensors_in
from brevitas_bp.private import in_forward_ad

# Arguments that change what a mean is, or are deprecated: such calls run as they are.
_OTHER = ("size_average", "reduce")


@dataclass(frozen=True)
class SaveLossDerivative:
    """Rewrites a loss of input and target, so that it saves one tensor: its derivative by the input.

    Plain autograd saves input and target, and computes the derivative in backward. Here autograd
    computes it in the forward pass, from the same function with ``reduction="none"``. The loss itself
    is that of the function that was called, bit for bit.

    A call runs as it is if the target or a weight needs a gradient, if input and target differ in shape
    (broadcasting), or if the input is small.

    Args:
        weighted_mean: name of an argument with which a mean divides by something else than the number
            of elements; calls with this argument run as they are.
        signs: whether the derivative is -1, 0 or 1, and is stored as such.
    """

    weighted_mean: str | None = None
    signs: bool = False

    def __call__(self, running: RunningPass, call: Call) -> Any:
        bound = _bound(call)
        if bound is None:
            return NotImplemented
        x, target, reduction = bound["input"], bound["target"], bound.get("reduction", "mean")
        others = tensors_in(v for name, v in bound.items() if name != "input")
        if not (isinstance(x, Tensor) and isinstance(target, Tensor) and x.shape == target.shape
                and x.requires_grad and torch.is_grad_enabled() and is_ordinary(x)
                and x.is_floating_point() and x.numel() >= SMALLEST and not in_forward_ad()):
            return NotImplemented
        if reduction not in ("none", "mean", "sum") or any(
                t.requires_grad or not is_ordinary(t) for t in others):
            return NotImplemented
        if any(bound.get(name) is not None for name in (*_OTHER, self.weighted_mean or "")):
            return NotImplemented
        with running.saving(SIGN if self.signs else DERIVATIVE) as substitution:
            return _SaveLossDerivative.apply(x, call, bound, reduction, substitution)


def _bound(call: Call) -> dict[str, Any] | None:
    """Returns the arguments of a call by name; None if they are not known."""
    if not isinstance(call.function, FunctionType):
        return None
    try:
        return dict(_signature(call.function).bind(*call.args, **call.kwargs).arguments)
    except TypeError:
        return None


@lru_cache(maxsize=64)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


class _SaveLossDerivative(torch.autograd.Function):

    @staticmethod
    def forward(
            ctx: Any, x: Tensor, call: Call, bound: dict[str, Any], reduction: str,
            substitution: Substitution) -> Tensor:
        loss = call.function(*call.args, **call.kwargs)
        with torch.enable_grad(), saved_tensors_hooks(substitution.note, lambda saved: saved):
            leaf = x.detach().requires_grad_()
            each = call.function(**{**bound, "input": leaf, "reduction": "none"})
            (derivative,) = torch.autograd.grad(each, leaf, torch.ones_like(each))
        substitution.replace(leaf, x)
        ctx.save_for_backward(derivative)
        ctx.function, ctx.divisor = call.name, x.numel() if reduction == "mean" else 1
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse_second_derivative(ctx.function)
        (derivative,), grad = ctx.saved_tensors, grads[0]
        return (derivative * (grad / ctx.divisor)).to(derivative.dtype), None, None, None, None
