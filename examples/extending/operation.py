"""An operation of your own: ``register_op`` tells the policy what backward does with what it saves.

    python examples/extending/operation.py

The default policy keeps what it does not know, exact. Reports name such operations. This file has one of
each kind: a Python function made of torch's operations, and a ``torch.autograd.Function``.

Expect no unknown operation after registration and an eighth of the bytes. The error of the mean of 100
gradients is a tenth of that of one: the gradient is unbiased.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from brevitas_bp import QuantBackwardWrapper, register_op, track_saved_memory
from brevitas_bp.backward.operations import elementwise, linear
from brevitas_bp.backward.saved import Call


def snake(x: Tensor, a: float = 1.0) -> Tensor:
    """An activation, ``x + sin(a x)**2 / a``."""
    # These two lines let the wrapper see the call. Torch's own functions have them too.
    if has_torch_function_unary(x):
        return handle_torch_function(snake, (x,), x, a)
    return x + torch.sin(a * x)**2 / a


def slope(x: Tensor, y: Tensor, call: Call) -> Tensor:
    """Returns the derivative of :func:`snake` for input ``x`` and output ``y``."""
    return 1 + torch.sin(2 * call.argument(1, "a", 1.0) * x)


class _Scaled(torch.autograd.Function):
    """``x * scale``, written by hand. Backward is linear in the ``x`` that it saves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).sum(0)


class Scale(nn.Module):
    """Multiplies each feature by a parameter, with a Function of its own."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return _Scaled.apply(x, self.scale)  # pyright: ignore


class Snake(nn.Module):
    """The activation as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return snake(x, 0.5)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), Snake(), Scale(256), nn.Linear(256, 8))


def stored(x: Tensor) -> tuple[int, Any]:
    """Returns stored bytes and the operations that no rule describes."""
    model = QuantBackwardWrapper(network())
    with track_saved_memory(model) as report:
        loss = model(x).square().mean()
    loss.backward()
    return report.stored_bytes, report.unknown_operations


def register() -> None:
    """Registers both; done once, when your code is imported."""
    # The policy stores the derivative in place of the input: backward is linear in it. With
    # elementwise() alone, autograd computes the derivative, which takes longer.
    register_op(snake, elementwise(slope))
    # A Function has no arguments that the policy could see, so the rule belongs to the module's class.
    register_op(Scale, linear())


def gradient_error(x: Tensor, draws: int) -> float:
    """Returns how far the mean of some rounded gradients is from the exact gradient, relative to it."""
    def gradient(model: nn.Module) -> Tensor:
        model.zero_grad()
        model(x).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact = gradient(network())
    model = QuantBackwardWrapper(network())
    mean = torch.stack([gradient(model) for _ in range(draws)]).mean(0)
    return float((mean - exact).norm() / exact.norm())


def main() -> None:
    x = torch.randn(512, 64)
    for when in ("before", "after"):
        nbytes, unknown = stored(x)
        print(f"{when}: {nbytes / 2**10:.0f} KiB, unknown operations: {unknown or 'none'}")
        register()
    for draws in (1, 100):
        print(f"error of the mean of {draws} gradients: {gradient_error(x, draws):.4f}")


if __name__ == "__main__":
    main()
