"""H18: retain_graph, several backwards, double backward."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from brevitas_bp import QuantBackwardWrapper
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Stochastic2
from tests.backward.support import NETS, QUANTIZING, Apply, cotangent, net


@pytest.mark.parametrize("storage", ["save_quantized", "quantize_on_backward"])
@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("name", NETS)
def test_second_backward_repeats_the_first(name: str, policy: str, storage: Any) -> None:
    module, inputs = net(name)
    model = QuantBackwardWrapper(
        copy.deepcopy(module), Stochastic2, policy=policy, seed=0, storage=storage)
    output = model(*inputs)
    passes = []
    for _ in range(2):
        model.zero_grad()
        output.backward(cotangent(output), retain_graph=True)
        passes.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert passes[0]
    assert all(torch.equal(a, b) for a, b in zip(*passes))


def test_drawing_noise_in_the_unpack_hook_does_not_repeat() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with saved_tensors_hooks(lambda t: t.detach(), lambda t: torch.floor(t + torch.rand_like(t))):
        output = x.square()
    first, second = (
        torch.autograd.grad(output.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert not torch.equal(first, second)


SMOOTH: dict[str, Any] = {
    "linear": lambda: nn.Linear(4, 3),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3), nn.Flatten()),
    "saved output": lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Softmax(-1)),
    "gelu, norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4)),
    "product": lambda: Apply(lambda x: x.exp() * x.sin() / (1 + x * x)),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_second_derivatives_are_right_under_an_exact_policy(name: str) -> None:
    torch.manual_seed(0)
    model = QuantBackwardWrapper(SMOOTH[name]().double(), policy="exact")
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, x)
    assert torch.autograd.gradgradcheck(model, x)


def penalty_grads(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns gradients of a loss that contains a gradient."""
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
    return list(torch.autograd.grad(
        slope.square().sum(), [leaf, *model.parameters()], allow_unused=True,
        materialize_grads=True))


@pytest.mark.parametrize("name", SMOOTH)
def test_gradient_penalty_equals_plain_autograd_under_an_exact_policy(name: str) -> None:
    torch.manual_seed(0)
    module, x = SMOOTH[name](), torch.randn(3, 4)
    plain, wrapped = (
        penalty_grads(m, x) for m in (module, QuantBackwardWrapper(module, policy="exact")))
    assert all(torch.equal(a, b) for a, b in zip(plain, wrapped))


@pytest.mark.parametrize(("policy", "between"), [
    ("all", nn.Tanh()), ("op_aware", Apply(torch.square)), ("op_aware", nn.LayerNorm(64))])
def test_double_backward_works_with_quantized_tensors(policy: str, between: nn.Module) -> None:
    # The default policy rewrites tanh, so it refuses the second derivative: test_rewrites.py.
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), between, nn.Linear(64, 1))
    grads = penalty_grads(QuantBackwardWrapper(module, policy=policy), torch.randn(64, 64))
    assert all(grad.isfinite().all() for grad in grads)
