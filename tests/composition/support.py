"""Shared by the composition tests: the two promises of the wrapper, as assertions."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from tests.backward.support import (
    QUANTIZING,
    Run,
    assert_same,
    naive_hooks,
    run,
    wrapped_run,
)

POLICIES = [*QUANTIZING, "exact"]

#: Number of draws in a mean over noise.
DRAWS = 200

#: As many images as a weight has rows: after a cast, shapes do not tell input from weight.
X = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))


def assert_exact_policy_is_plain(module: nn.Module, *inputs: Tensor) -> Run:
    """Compares outputs, gradients, buffers and random state with plain autograd's; returns plain's."""
    plain, wrapped = run(module, *inputs), wrapped_run(module, *inputs, policy="exact")
    assert torch.equal(wrapped.output, plain.output)
    assert torch.equal(wrapped.rng, plain.rng)
    assert_same(wrapped.buffers, plain.buffers)
    assert_same(wrapped.grads, plain.grads)
    return plain


def assert_default_policy_trains(module: nn.Module, *inputs: Tensor, ratio: float) -> Run:
    """Asserts plain outputs, finite gradients of plain's kinds, and bytes smaller by ``ratio``."""
    plain, wrapped = run(module, *inputs), wrapped_run(module, *inputs)
    assert torch.equal(wrapped.output, plain.output)
    assert torch.equal(wrapped.rng, plain.rng)
    assert_same(wrapped.buffers, plain.buffers)
    assert wrapped.grads.keys() == plain.grads.keys()
    for name, grad in plain.grads.items():
        assert (wrapped.grads[name].dtype, wrapped.grads[name].stride()) == (grad.dtype, grad.stride())
        assert wrapped.grads[name].isfinite().all()
    assert saved_ratio(module, *inputs) >= ratio
    return wrapped


def saved_ratio(module: nn.Module, *inputs: Tensor, **options: Any) -> float:
    """Returns bytes that plain autograd saves, divided by bytes stored."""
    model = QuantBackwardWrapper(copy.deepcopy(module), **options)
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    with track_saved_memory(model) as report:
        output = model(*leaves)
    assert output.requires_grad
    return report.exact_bytes / report.stored_bytes


def naive_differs(
        module: nn.Module, *inputs: Tensor, name: str = "input 0",
        within: AbstractContextManager[Any] | None = None) -> bool:
    """The control: whether hooks that quantize everything change a gradient that the wrapper keeps."""
    plain = run(module, *inputs).grads[name]
    with naive_hooks(), within or nullcontext():
        return not torch.equal(run(module, *inputs).grads[name], plain)


def mean_grad(model: nn.Module, x: Tensor, cotangent: Tensor, name: str) -> Tensor:
    """Returns the mean over :data:`DRAWS` backwards of the gradient of one parameter."""
    parameter = model.get_parameter(name)
    total = torch.zeros(parameter.shape, dtype=torch.float64)
    for _ in range(DRAWS):
        parameter.grad = None
        model(x).backward(cotangent)
        assert parameter.grad is not None
        total += parameter.grad
    return total / DRAWS


def grads(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters' gradients, by the names in the unwrapped module."""
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()
            if p.grad is not None}


def mlp() -> nn.Sequential:
    """Returns a small network, the same at each call; only its activation is rewritten."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))


def both(train: Callable[[nn.Module], Any], policy: str = "exact") -> list[Any]:
    """Returns (result of ``train``, gradients it leaves) for a plain and a wrapped :func:`mlp`."""
    results = []
    for wrap in (lambda m: m, lambda m: QuantBackwardWrapper(m, policy=policy, seed=0)):
        model = wrap(mlp())
        results.append((train(model), grads(model)))
    return results
