"""Rounded gradients with stored activations, checkpointing, autocast, compilation, torch.func."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp.grad import QuantGradientWrapper
from brevitas_bp.grad.layers import rounding_of
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic
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
    exact = Checkpointed(use_reentrant)
    exact(x).sum().backward()
    model.last.weight.grad = model.last.bias.grad = None
    # The cotangent of the checkpointed part is exact: the last layer is not rounded here.
    restored = rounding_of(model.last)
    assert restored is not None
    restored.for_input = restored.for_weight = None
    model(x).sum().backward()
    if not stored:
        assert torch.equal(model.last.bias.grad, exact.last.bias.grad)
    for layer in (0, 2):
        ours, theirs = model.part[layer].bias.grad, exact.part[layer].bias.grad
        # At 2 bits; biases do not depend on stored activations.
        assert float((ours - theirs).norm() / theirs.norm()) > 1e-3


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


@traced
@pytest.mark.parametrize("equal_seeds", [True, False])
def test_compiled_roundings_of_activations_and_gradients_are_independent(equal_seeds: bool) -> None:
    """With one seed for both, the gradient of a weight would be a product of two equal roundings."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x, cotangent = nn.Linear(64, 64, bias=False), torch.randn(64, 64), torch.randn(64, 64)
    layer(x).backward(cotangent)
    exact = layer.weight.grad.clone()
    codes = {"bit_width": 2, "bucket_size": 64}
    inner = QuantGradientWrapper(
        layer, None, ShiftedUint2DynamicActPerBucketFloatStochastic, seed=1, weight_grad_bucket_size=64)
    model = QuantBackwardWrapper(
        torch.compile(inner, backend="aot_eager"), ShiftedUint2DynamicActPerBucketFloatStochastic,
        seed=1 if equal_seeds else 2, **codes)
    mean, draws = torch.zeros_like(exact), 200
    squares = 0.0
    for _ in range(draws):
        layer.zero_grad()
        model(x).backward(cotangent)
        mean += layer.weight.grad / draws
        squares += float((layer.weight.grad - exact).square().sum()) / draws
    # An unbiased mean of n draws is off by 1 / n of the mean square of one draw, up to chance.
    assert float((mean - exact).square().sum()) < 1.5 * squares / draws


@traced
def test_equal_compiled_blocks_share_a_graph() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(12)))
    model = QuantGradientWrapper(blocks)
    for block in blocks:
        block.compile(backend="aot_eager")
    for _ in range(2):
        model(torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@traced
def test_a_layer_that_is_used_twice_rounds_twice_in_a_graph() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    QuantGradientWrapper(layer, None, weight_grad_bit_width=2)
    x, z, cotangent = torch.randn(8, 16), torch.randn(8, 16), torch.randn(8, 16)

    def both(x: Tensor, z: Tensor) -> Tensor:
        return layer(x) + layer(z)

    def variance(function: Callable[..., Tensor]) -> float:
        draws = []
        for _ in range(150):
            layer.zero_grad()
            function(x, z).backward(cotangent)
            draws.append(layer.bias.grad.clone())
        return float(torch.stack(draws).var(0).sum())

    # Bias: the sum of two roundings of one gradient. Equal ones would have twice the variance.
    assert variance(torch.compile(both, backend="aot_eager")) < 1.5 * variance(both)


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
