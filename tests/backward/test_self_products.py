"""A weight computed from the layer's own input: backward multiplies two roundings of one tensor.

``tests/referee`` moves the saved tensors of every operator this way. Here real quantizers draw the
noise.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from brevitas_bp import QuantBackwardWrapper, SavedTensor, register_op
from brevitas_bp.backward import OpAware
from brevitas_bp.backward.operations import linear
from brevitas_bp.backward.origins import goes_through_rounding_of
from brevitas_bp.backward.registry import OpRule, rule_of
from brevitas_bp.backward.saved import Decision, storage_id
from brevitas_bp.backward.seam import listening
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Stochastic2
from tests.backward.support import Apply

DRAWS = 150
Function = Callable[[Tensor, nn.Module], Tensor]


def _kernel(z: Tensor, p: nn.Module) -> Tensor:
    return p(z)[:, :, :3, :3].mean(0, keepdim=True).expand(4, -1, -1, -1)


#: name -> (function of an input and a layer, shape of the input).
CASES: dict[str, tuple[Function, tuple[int, ...]]] = {
    "linear": (lambda z, p: F.linear(z, p(z)), (64, 64)),
    "matmul": (lambda z, p: z @ p(z).T, (64, 64)),
    "mul": (lambda z, p: z * p(z), (64, 64)),
    "div": (lambda z, p: z / (p(z).abs() + 1), (64, 64)),
    "conv2d": (lambda z, p: F.conv2d(z, _kernel(z, p)), (8, 16, 16, 64)),
    "rms_norm": (lambda z, p: F.rms_norm(z, (64,), p(z).mean(0)), (64, 64)),
    "layer_norm": (lambda z, p: F.layer_norm(z, (64,), p(z).mean(0)), (64, 64)),
    "prelu": (lambda z, p: F.prelu(z, p(z).mean(0)), (64, 64)),
}


class _Layer(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.p = nn.Linear(64, 64)

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z, self.p)


class _AllShared(OpAware):
    """The policy, except that all operations share their roundings, at one width."""

    def decide(self, saved: SavedTensor) -> Decision:
        return super().decide(saved)._replace(shared=True, reach="weight", units=None)


def bias(name: str, policy: OpAware) -> float:
    """Returns the relative bias of the gradient of the weight's layer, less the part due to chance."""
    function, shape = CASES[name]
    torch.manual_seed(0)
    layer = _Layer(function)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    # Weights the square of a rounding with its own row, always with one sign.
    out = layer(z)
    cotangent = torch.eye(64) if name in ("linear", "matmul") else torch.rand(out.shape)

    def gradient(module: nn.Module) -> Tensor:
        grads = torch.autograd.grad(module(z), list(layer.parameters()), cotangent)
        return torch.cat([g.flatten().double() for g in grads])

    exact = gradient(layer)
    wrapped = QuantBackwardWrapper(layer, Stochastic2, policy=policy, seed=0, bucket_size=64)
    drawn = torch.stack([gradient(wrapped) for _ in range(DRAWS)])
    by_chance = drawn.var(0).sum() / DRAWS
    off = (drawn.mean(0) - exact).square().sum() - by_chance
    return float(off.clamp(min=0).sqrt() / exact.norm())


@pytest.mark.parametrize("name", CASES)
def test_the_mean_is_right(name: str) -> None:
    assert bias(name, OpAware()) < 0.05


@pytest.mark.parametrize("name", ["linear", "matmul", "mul", "div"])
def test_with_one_rounding_it_is_not(name: str) -> None:
    assert bias(name, OpAware(multiplier_bits=2)) < 0.05 < bias(name, _AllShared(multiplier_bits=2))


def decided(module: nn.Module, *inputs: Tensor) -> list[Decision]:
    """Returns the policy's decisions about the inputs of linear layers."""
    found = []

    class Noting(OpAware):
        def decide(self, saved: SavedTensor) -> Decision:
            decision = super().decide(saved)
            if saved.op == "linear" and decision.codec is not None:
                found.append(decision)
            return decision

    QuantBackwardWrapper(module, Stochastic2, policy=Noting(), seed=0)(*inputs)
    return found


def test_weights_made_of_parameters_alone_share() -> None:
    x = torch.randn(64, 64)
    for layer in (nn.Linear(64, 64), weight_norm(nn.Linear(64, 64))):
        (decision,) = decided(layer, x)
        assert decision.shared and decision.reach == "weight"


def test_a_weight_made_of_what_is_rounded_does_not() -> None:
    first, second = decided(_Layer(CASES["linear"][0]), torch.randn(64, 64))
    assert first.shared and first.reach == "weight"
    assert not second.shared and second.reach == "all"


def test_a_bias_that_is_a_parameter_is_no_factor() -> None:
    bias = nn.Parameter(torch.zeros(64))
    *_, last = decided(_Layer(lambda z, p: F.linear(z, p(z), bias)), torch.randn(64, 64))
    assert not last.shared and last.reach == "all"


def test_a_weight_made_of_another_tensor_shares() -> None:
    module = Apply(lambda z, y: F.linear(z, (y * 1).view(64, 64) * 2))
    (decision,) = decided(module, torch.randn(64, 64), torch.randn(64, 64, requires_grad=True))
    assert decision.shared and decision.reach == "weight"


def test_what_is_marked() -> None:
    layer = nn.Linear(64, 64)
    x = torch.randn(64, 64, requires_grad=True)

    def marked(module: nn.Module, tensor: Tensor) -> bool:
        return goes_through_rounding_of(storage_id(tensor), module(x).view(-1).exp())

    wrapped = QuantBackwardWrapper(layer, Stochastic2)
    assert marked(wrapped, x) and not marked(wrapped, layer.weight)
    assert not marked(layer, x) and not marked(QuantBackwardWrapper(layer, policy="exact"), x)


def test_other_libraries_operators_have_no_rule_of_torchs() -> None:
    with torch.library._scoped_library("brevitas_bp_tests", "DEF") as library:
        for name in ("relu", "silu", "linear", "layer_norm", "rms_norm", "avg_pool2d"):
            library.define(f"{name}(Tensor x) -> Tensor")
            library.impl(name, torch.clone, "CompositeImplicitAutograd")
            packet = getattr(torch.ops.brevitas_bp_tests, name)
            assert rule_of(packet) is None and rule_of(packet.default) is None
    assert isinstance(rule_of(torch.ops.aten.relu), OpRule)


def test_an_operator_of_another_library_is_exact_and_named() -> None:
    @torch.library.custom_op("brevitas_bp_tests::relu", mutates_args=())
    def relu(x: Tensor) -> Tensor:
        return x.clamp(min=0).square()

    relu.register_autograd(
        lambda ctx, g: 2 * g * ctx.saved_tensors[0].clamp(min=0),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    relu.register_fake(torch.empty_like)
    x = torch.full((64, 64), 3.0, requires_grad=True)
    model = QuantBackwardWrapper(Apply(torch.ops.brevitas_bp_tests.relu), Stochastic2)
    model(x).sum().backward()
    assert x.grad is not None and bool((x.grad == 6).all())
    assert model.explain().unknown == ["relu"]


def test_the_base_of_a_view_that_is_changed_in_place_is_marked() -> None:
    def function(z: Tensor, p: nn.Module) -> Tensor:
        made = torch.einsum("ij,kj->ik", z, torch.eye(64, requires_grad=True))
        assert made._base is not None
        return F.linear(z, made.relu_())

    *_, last = decided(_Layer(function), torch.randn(64, 64))
    assert not last.shared


def test_a_copy_of_the_input_is_no_other_argument() -> None:
    layer = weight_norm(nn.Linear(64, 64))
    first = nn.Linear(64, 64)
    module = Apply(lambda x: layer(first(x).transpose(0, 1)))
    module.add_module("first", first)
    module.add_module("layer", layer)
    *_, last = decided(module, torch.randn(64, 64))
    assert last.shared and last.reach == "weight"


def test_deep_weights_of_other_tensors_share() -> None:
    def function(z: Tensor, p: nn.Module) -> Tensor:
        made = p(torch.ones(64, 64))
        for _ in range(300):
            made = made * 1.01
        return F.linear(z, made)

    *_, last = decided(_Layer(function), torch.randn(64, 64))
    assert last.shared and last.reach == "weight"


def test_custom_functions_do_not_share_what_others_have_rounded(registry: None) -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            x, y = ctx.saved_tensors
            return grads[0] * y, grads[0] * x

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Linear(64, 64)

        def forward(self, z: Tensor) -> Any:
            return Product.apply(z, self.p(z))

    register_op(Own, linear())
    payloads = []

    class Listener:
        def __call__(self, saved: SavedTensor, packed: Any, decision: Decision, originals: Any) -> None:
            payloads.append((storage_id(saved.tensor), id(packed), packed))

    model, z = QuantBackwardWrapper(Own(), Stochastic2, seed=0), torch.randn(64, 64)
    with listening(model, Listener()):
        model(z)
    of_z = {number for storage, number, _ in payloads if storage == storage_id(z)}
    assert len(of_z) == 2
