"""Rounded gradients with stored activations, checkpointing, autocast, compilation, torch.func."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp.grad import QuantGradientWrapper
from tests.grad.test_wrapper import X, gradient, loss, net


def test_stored_activations_and_rounded_gradients_in_either_order() -> None:
    reports = []
    for wrap in (
            lambda m: QuantBackwardWrapper(m, seed=1),
            lambda m: QuantBackwardWrapper(QuantGradientWrapper(m, seed=1), seed=1),
            lambda m: QuantGradientWrapper(QuantBackwardWrapper(m, seed=1), seed=1)):
        model = wrap(net())
        with track_saved_memory(model) as report:
            value = loss(model)
        value.backward()
        reports.append((report.exact_bytes, report.stored_bytes, report.tensors))
    assert len(set(reports)) == 1


def test_exact_activations_leave_only_the_noise_of_gradients() -> None:
    plain = gradient(QuantGradientWrapper(net(), seed=1))
    model = QuantBackwardWrapper(QuantGradientWrapper(net(), seed=1), policy="exact")
    assert torch.equal(gradient(model), plain)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.last = nn.Linear(8, 4)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.part, x, use_reentrant=self.use_reentrant))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_checkpointed_parts_round_too(use_reentrant: bool, stored: bool) -> None:
    model: nn.Module = QuantGradientWrapper(
        Checkpointed(use_reentrant), input_grad_bit_width=2, weight_grad_bit_width=2)
    if stored:
        model = QuantBackwardWrapper(model)
    x = torch.randn(16, 8, requires_grad=True)
    exact = torch.autograd.grad(
        Checkpointed(use_reentrant).part(x).square().sum(), x)[0]
    model.part.zero_grad()
    model(x).square().sum().backward()
    assert x.grad is not None and model.part[0].weight.grad is not None
    rounded = torch.autograd.grad(model.part(x).square().sum(), x)[0]
    assert not torch.allclose(rounded, exact, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    plain, module = net(), net()
    model = QuantGradientWrapper(module)
    with torch.autocast("cpu", dtype=dtype):
        expected, value = loss(plain), loss(model)
    assert torch.equal(value, expected)
    expected.backward()
    value.backward()
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert ours.grad.dtype == theirs.grad.dtype == torch.float32
    error = sum(float((a.grad - b.grad).square().sum()) for a, b in zip(  # pyright: ignore
        module.parameters(), plain.parameters()))
    size = sum(float(b.grad.square().sum()) for b in plain.parameters())  # pyright: ignore
    assert error < 0.05 * size


# Dynamo itself makes an instance of a Function that is not static.
traced = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
WRAPS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled inside": lambda m: QuantGradientWrapper(m) and torch.compile(
        m, backend="aot_eager", fullgraph=True),
    "compiled outside": lambda m: torch.compile(
        QuantGradientWrapper(m), backend="aot_eager", fullgraph=True),
    "stored": lambda m: QuantBackwardWrapper(torch.compile(
        QuantGradientWrapper(m), backend="aot_eager"))}


@traced
@pytest.mark.parametrize("wrap", WRAPS)
def test_compiled_graphs_draw_new_noise_in_each_step(wrap: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = net()
    model, exact = WRAPS[wrap](module), gradient(net())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    steps = []
    for _ in range(3):
        module.zero_grad()
        loss(model).backward()
        steps.append(torch.cat([p.grad.flatten() for p in module.parameters()]))  # pyright: ignore
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(steps[0], steps[1]) and not torch.equal(steps[1], steps[2])
    for step in steps:
        assert float((step - exact).norm() / exact.norm()) < (0.5 if wrap == "stored" else 0.05)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_functional_gradients_round() -> None:
    model = QuantGradientWrapper(nn.Linear(4, 3), seed=1)
    x = torch.randn(5, 4)
    parameters = dict(model.named_parameters())

    def value(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    ours = torch.func.grad(value)(parameters)["weight"]
    plain = model.unwrap()
    theirs = torch.func.grad(value)(dict(plain.named_parameters()))["weight"]
    assert 0 < float((ours - theirs).detach().norm() / theirs.detach().norm()) < 0.05


def test_many_steps_train() -> None:
    torch.manual_seed(0)
    model = QuantGradientWrapper(net(), input_grad_bit_width=4, weight_grad_bit_width=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    labels = torch.arange(6) % 4
    losses = []
    for _ in range(40):
        value = nn.functional.cross_entropy(model(X), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.2 * losses[0]
