"""Derivatives of activations are encoded from the input, without writing the derivative to memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp.backward import OpAware, register_op
from brevitas_bp.backward.operations import elementwise
from brevitas_bp.backward.saved import DERIVATIVE, Decision, SavedTensor
from brevitas_bp.codec.derivatives import derivative_at
from brevitas_bp.kernels import use
from brevitas_bp.quant import ShiftedUint8DynamicActPerBucketFloatStochastic as Stochastic8
from tests.backward.support import Apply

SHAPE = (2, 8, 9, 7)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "silu in place": lambda x: F.silu(x * 1, inplace=True), "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"), "sigmoid": torch.sigmoid,
    "sigmoid in place": lambda x: (x * 1).sigmoid_(), "tanh": torch.tanh}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x, "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "gapped": lambda x: torch.stack([x, x], -1)[..., 0], "negated": lambda x: torch._neg_view(-x)}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


class Kept(OpAware):
    """Keeps derivatives exact."""

    def decide(self, saved: SavedTensor) -> Decision:
        decision = super().decide(saved)
        return decision if saved.role != DERIVATIVE else Decision(None, "kept by the test")


def gradients(
        function: Callable[[Tensor], Tensor], x: Tensor, *, report: bool = False, times: int = 1,
        **options: Any) -> list[Tensor]:
    """Returns the gradients of several backward passes with one seed."""
    torch.manual_seed(0)
    model = QuantBackwardWrapper(Apply(function), Stochastic8, seed=3, bucket_size=64, **options)
    x = x.detach().requires_grad_()
    if report:
        with track_saved_memory(model):
            y = model(x)
    else:
        y = model(x)
    weights = torch.randn(y.shape)
    return [
        torch.autograd.grad((y * weights).sum(), x, retain_graph=True)[0] for _ in range(times)]


@each_function
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_close_whatever_the_layout(name: str, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(SHAPE))
    (got,), (exact,) = gradients(FUNCTIONS[name], x), gradients(FUNCTIONS[name], x, policy="exact")
    # One of 255 steps of a range below 1.3, times a weight below 5.
    assert 0 < (got - exact).abs().max() < 0.03


@each_function
@pytest.mark.parametrize("options", [
    {"report": True}, {"verify": True}, {"storage": "quantize_on_backward"}], ids=str)
def test_other_ways_to_the_same_bytes_give_the_same_gradients(
        name: str, options: dict[str, Any]) -> None:
    """A report, and quantizing on backward, write the derivative to memory first."""
    x = torch.randn(SHAPE)
    assert torch.equal(*gradients(FUNCTIONS[name], x), *gradients(FUNCTIONS[name], x, **options))


@each_function
def test_without_compiled_kernels_gradients_are_the_same(
        name: str) -> None:
    x = torch.randn(SHAPE)
    (expected,) = gradients(FUNCTIONS[name], x)
    with use("reference"):
        assert torch.equal(*gradients(FUNCTIONS[name], x), expected)


@each_function
@pytest.mark.parametrize("policy", ["op_aware", Kept()], ids=["rounded", "kept"])
def test_a_second_backward_finds_the_derivative_as_it_was(name: str, policy: Any) -> None:
    """Backward multiplies in place if the derivative has its own memory."""
    first, second = gradients(FUNCTIONS[name], torch.randn(SHAPE), times=2, policy=policy)
    assert torch.equal(first, second)


@each_function
def test_a_policy_may_keep_a_derivative(name: str) -> None:
    x = torch.randn(SHAPE)
    (got,) = gradients(FUNCTIONS[name], x, policy=Kept())
    (exact,) = gradients(FUNCTIONS[name], x, policy="exact")
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", [OpAware(), OpAware(few_bit=8)], ids=["rounded", "few-bit"])
def test_the_derivative_at_a_parameter_is_no_parameter(policy: OpAware) -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(16, 32))

        def forward(self, x: Tensor) -> Tensor:
            return x * F.silu(self.scale)

    module, x = Gate(), torch.randn(16, 32)
    QuantBackwardWrapper(module, Stochastic8, seed=0, policy=policy)(x).sum().backward()
    got, module.scale.grad = module.scale.grad, None
    module(x).sum().backward()
    assert got is not None and module.scale.grad is not None
    assert 0 < (got - module.scale.grad).abs().max() < 0.05


def test_a_derivative_that_is_expanded_is_not_written_to(registry: None) -> None:
    def scaled(x: Tensor, factors: Tensor) -> Tensor:
        if torch.overrides.has_torch_function((x, factors)):
            return torch.overrides.handle_torch_function(scaled, (x, factors), x, factors)
        return torch.mul(x, factors)

    register_op(scaled, elementwise(lambda x, y, call: call.args[1].expand_as(x)))
    # Use rows that are not constant: constant rows would be exact.
    factors = torch.randn(1, 512)
    (got,) = gradients(lambda x: scaled(x, factors), torch.randn(64, 512))
    (exact,) = gradients(lambda x: x * factors, torch.randn(64, 512), policy="exact")
    assert 0 < (got - exact).abs().max() < 0.3


def test_two_activations_of_one_tensor_are_rounded_apart() -> None:
    class Spy(OpAware):
        def decide(self, saved: SavedTensor) -> Decision:
            decision = super().decide(saved)
            names.append(saved.derivative)
            return decision

    names: list[str | None] = []
    x = torch.randn(SHAPE)
    (twice,) = gradients(lambda x: torch.stack([F.silu(x), F.silu(x)]), x, policy=Spy())
    assert names == ["silu", "silu"]
    (once,) = gradients(F.silu, x)
    assert not torch.equal(twice, 2 * once)


def test_a_derivative_is_laid_out_like_its_tensor() -> None:
    x = torch.randn(SHAPE).to(memory_format=torch.channels_last)
    d = derivative_at(x, "silu")
    assert d.stride() == x.stride()
    exact = torch.ops.aten.silu_backward(torch.ones_like(x), x)
    torch.testing.assert_close(d, exact, rtol=0, atol=1e-6)
