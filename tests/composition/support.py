"""What the tests of composition share: the two promises, asserted in one way."""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from tests.backward.support import Run, assert_same, naive_hooks, run, wrapped_run

#: Draws of a mean over noise.
DRAWS = 200


def assert_exact_policy_is_plain(module: nn.Module, *inputs: Tensor) -> Run:
    """Bit for bit the outputs, gradients, buffers and random state of plain autograd; returns these."""
    plain, wrapped = run(module, *inputs), wrapped_run(module, *inputs, policy="exact")
    assert torch.equal(wrapped.output, plain.output)
    assert torch.equal(wrapped.rng, plain.rng)
    assert_same(wrapped.buffers, plain.buffers)
    assert_same(wrapped.grads, plain.grads)
    return plain


def assert_default_policy_trains(module: nn.Module, *inputs: Tensor, ratio: float) -> Run:
    """The forward of plain autograd, finite gradients of its kinds, and bytes smaller by ``ratio``."""
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
    """Bytes that plain autograd saves, over bytes stored."""
    model = QuantBackwardWrapper(copy.deepcopy(module), **options)
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    with track_saved_memory(model) as report:
        output = model(*leaves)
    assert output.requires_grad
    return report.exact_bytes / report.stored_bytes


def naive_differs(
        module: nn.Module, *inputs: Tensor, name: str = "input 0",
        within: AbstractContextManager[Any] | None = None) -> bool:
    """The control: whether hooks that quantize whatever comes change a gradient that ours do not."""
    plain = run(module, *inputs).grads[name]
    with naive_hooks(), within or nullcontext():
        return not torch.equal(run(module, *inputs).grads[name], plain)


def mean_grad(model: nn.Module, x: Tensor, cotangent: Tensor, name: str) -> Tensor:
    """Mean over :data:`DRAWS` backwards of the gradient of one parameter."""
    parameter = model.get_parameter(name)
    total = torch.zeros(parameter.shape, dtype=torch.float64)
    for _ in range(DRAWS):
        parameter.grad = None
        model(x).backward(cotangent)
        assert parameter.grad is not None
        total += parameter.grad
    return total / DRAWS
