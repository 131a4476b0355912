"""The functions of torch that the entries of activations describe."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from brevitas_bp.activations.functions import ACTIVATIONS


def function_of_torch(name: str) -> Callable[..., Tensor]:
    """Returns torch's function for the name of an entry."""
    for entry in ACTIVATIONS.values():
        variant = entry.variant
        if variant is not None and variant.name == name:
            return partial(function_of_torch(entry.name), **{variant.parameter.name: variant.value})
    # Functions of torch.nn.functional that have moved to torch warn.
    return getattr(torch if name in ("sigmoid", "tanh") or not hasattr(F, name) else F, name)


def of_autograd(name: str, x: Tensor, **parameters: Any) -> Tensor:
    """Returns the derivative that autograd computes."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function_of_torch(name)(x, **parameters).sum(), x)[0]


def source(name: str, x: Tensor) -> Tensor:
    """Returns the tensor that the derivative at ``x`` is computed from."""
    of_output = ACTIVATIONS[name].of_output if name in ACTIVATIONS else None
    return x if of_output is None else of_output(x)


#: Points where exponentials overflow, points where functions bend, and numbers close to zero.
GRID = torch.cat([
    torch.linspace(-100, 100, 200_001), torch.linspace(-6, 6, 100_001),
    torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1e-45, -1e-45, 1e6, -1e6, 1e15, -1e15, 1e18, -1e18])])
