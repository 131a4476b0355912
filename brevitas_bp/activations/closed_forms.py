"""Derivatives of torch's activation functions in closed form, with the points where they jump.

Closed, not through autograd: a table is solved at first use, which may be within the user's forward
pass, where saved-tensor hooks and function modes would see every operation.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_SELU_ALPHA = 1.6732632423543772
_SELU_SCALE = 1.0507009873554805


class Derivative(NamedTuple):
    """``derivative(x, **parameters)``, and ``breaks(**parameters)``: where it jumps or has a kink."""

    derivative: Callable[..., Tensor]
    breaks: Callable[..., tuple[float, ...]] = lambda **_: ()


def _gelu(x: Tensor) -> Tensor:
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(x) + x * density


def _gelu_tanh(x: Tensor) -> Tensor:
    scale = math.sqrt(2 / math.pi)
    t = torch.tanh(scale * (x + 0.044715 * x**3))
    return (1 + t + x * (1 - t * t) * scale * (1 + 3 * 0.044715 * x * x)) / 2


def _silu(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _mish(x: Tensor) -> Tensor:
    t = torch.tanh(torch.nn.functional.softplus(x))
    return t + x * torch.sigmoid(x) * (1 - t * t)


def _elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(x > 0, 1, alpha * x.clamp(max=0).exp())


def _selu(x: Tensor) -> Tensor:
    return _SELU_SCALE * _elu(x, _SELU_ALPHA)


def _celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(x > 0, 1, (x.clamp(max=0) / alpha).exp())


def _softplus(x: Tensor, beta: float = 1.0) -> Tensor:
    return torch.sigmoid(beta * x)


def _tanh(x: Tensor) -> Tensor:
    return 1 - torch.tanh(x).square()


def _sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _logsigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(-x)


def _hardswish(x: Tensor) -> Tensor:
    return torch.where(x < -3, 0, torch.where(x <= 3, x / 3 + 0.5, 1))


def _softsign(x: Tensor) -> Tensor:
    return 1 / (1 + x.abs()).square()


def _leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Tensor:
    return torch.where(x > 0, torch.ones_like(x), negative_slope)


def _relu(x: Tensor) -> Tensor:
    return _leaky_relu(x, 0.0)


def _shrink(x: Tensor, lambd: float = 0.5) -> Tensor:
    return (x.abs() > lambd).to(x.dtype)


def _at_zero(**_: float) -> tuple[float, ...]:
    return (0.0,)


def _at_lambda(lambd: float = 0.5) -> tuple[float, ...]:
    return (-lambd, lambd)


#: By the name of the function in ``torch.nn.functional`` (``gelu_tanh``: ``approximate="tanh"``).
DERIVATIVES: dict[str, Derivative] = {
    "celu": Derivative(_celu, _at_zero),
    "elu": Derivative(_elu, _at_zero),
    "gelu": Derivative(_gelu),
    "gelu_tanh": Derivative(_gelu_tanh),
    "hardshrink": Derivative(_shrink, _at_lambda),
    "hardswish": Derivative(_hardswish, lambda **_: (-3.0, 3.0)),
    "leaky_relu": Derivative(_leaky_relu, _at_zero),
    "logsigmoid": Derivative(_logsigmoid),
    "mish": Derivative(_mish),
    "relu": Derivative(_relu, _at_zero),
    "selu": Derivative(_selu, _at_zero),
    "sigmoid": Derivative(_sigmoid),
    "silu": Derivative(_silu),
    "softplus": Derivative(_softplus),
    "softshrink": Derivative(_shrink, _at_lambda),
    "softsign": Derivative(_softsign, _at_zero),
    "tanh": Derivative(_tanh)}
