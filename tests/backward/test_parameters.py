"""H3: parameters and buffers are kept exact, in every disguise in which they are saved.

Every module here is linear in its input, so the gradient of the input depends on parameters alone. It
equals plain autograd's gradient bit for bit exactly if no parameter was quantized.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp.codec.layout import TensorLayout
from tests.backward.support import (
    QUANTIZING,
    SPIES,
    Apply,
    naive_pack,
    naive_unpack,
    run,
    wrapped_run,
)


def parameter(*shape: int, requires_grad: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape), requires_grad=requires_grad)


class Buffered(nn.Module):
    """Multiplies by buffers; autocast casts one of them, if it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.randn(32))
        self.register_buffer("basis", torch.randn(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.window) @ self.basis


class CrossAttentionValues(nn.Module):
    """The projections of ``nn.MultiheadAttention``, whose fused weight is split inside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(96, 32, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        key, value = self.weight.split([32, 64])
        return F.linear(F.linear(x, key), value)


#: Modules that take x [4, 32, 32], which requires a gradient.
DISGUISES: dict[str, Callable[[], nn.Module]] = {
    "transposed view of a 3-D linear": lambda: nn.Linear(32, 32),
    "chunk of a fused qkv": lambda: Apply(
        lambda x, w: F.linear(x, w.chunk(3)[1]), parameter(96, 32)),
    "tied, transposed": lambda: Apply(lambda x, w: x @ w.t() @ w, parameter(64, 32)),
    "column slice": lambda: Apply(lambda x, w: x @ w[:, 3:40:2], parameter(32, 64)),
    "select of a stack": lambda: Apply(lambda x, w: x @ w[2], parameter(4, 32, 32)),
    "unbind": lambda: Apply(lambda x, w: x @ w.unbind()[1], parameter(4, 32, 32)),
    "reshape that copies": lambda: Apply(
        lambda x, w: x @ w.transpose(0, 1).reshape(32, 64), parameter(4, 32, 16)),
    "contiguous copy": lambda: Apply(lambda x, w: x @ w.t().contiguous(), parameter(64, 32)),
    "expand": lambda: Apply(lambda x, w: x * w.expand(4, 32, 32), parameter(1, 32, 1)),
    "einsum": lambda: Apply(lambda x, w: torch.einsum("bij,jk->bik", x, w), parameter(32, 8)),
    "cast": lambda: Apply(lambda x, w: x.double() @ w.double(), parameter(32, 32)),
    "convolution": lambda: nn.Conv1d(32, 16, 3),
    "transposed convolution": lambda: nn.ConvTranspose1d(32, 16, 3, groups=4),
    "bilinear with buffers": Buffered,
    "frozen": lambda: nn.Linear(32, 32).requires_grad_(False),
}
CASTS: dict[str, Callable[[], nn.Module]] = {
    **{name: DISGUISES[name] for name in (
        "transposed view of a 3-D linear", "chunk of a fused qkv", "tied, transposed", "convolution",
        "transposed convolution", "bilinear with buffers", "frozen")},
    "frozen, 2 layers": lambda: nn.Sequential(
        nn.Linear(32, 64), nn.Linear(64, 32)).requires_grad_(False),
    "frozen convolution": lambda: nn.Conv1d(32, 16, 3).requires_grad_(False),
    "frozen, by keyword": lambda: Apply(
        lambda x, w: F.linear(x, weight=w), parameter(32, 32, requires_grad=False)),
    "frozen, matmul": lambda: Apply(
        lambda x, w: x @ w, parameter(32, 32, requires_grad=False)),
    "frozen, split": CrossAttentionValues,
    "frozen, bfloat16": lambda: nn.Linear(32, 32).requires_grad_(False).bfloat16(),
}


def skips_parameters(x: Tensor) -> Any:
    """Follows the usual advice: do not pack an ``nn.Parameter``."""
    return x if isinstance(x, nn.Parameter) else naive_pack(x)


def quantizes_a_parameter(module: nn.Module, x: Tensor) -> bool:
    """Whether a hook that skips only ``nn.Parameter`` gives a wrong gradient."""
    plain = run(module, x).grads["input 0"]
    with saved_tensors_hooks(skips_parameters, naive_unpack):
        return not torch.equal(run(module, x).grads["input 0"], plain)


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("name", DISGUISES)
def test_disguised_parameter_is_kept(name: str, policy: str) -> None:
    torch.manual_seed(0)
    module, x = DISGUISES[name](), torch.randn(4, 32, 32)
    shown_as_it_is = {"convolution", "transposed convolution"}
    assert quantizes_a_parameter(module, x) == (name not in shown_as_it_is)  # the control
    plain, wrapped = run(module, x), wrapped_run(module, x, policy=policy)
    assert torch.equal(wrapped.grads["input 0"], plain.grads["input 0"])


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("name", CASTS)
def test_autocast_copy_is_kept(name: str, policy: str) -> None:
    torch.manual_seed(0)
    module, x = CASTS[name](), torch.randn(4, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        if name != "frozen, bfloat16":
            assert quantizes_a_parameter(module, x)  # the control
        plain, wrapped = run(module, x), wrapped_run(module, x, policy=policy)
    assert torch.equal(wrapped.grads["input 0"], plain.grads["input 0"])


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_attention_keeps_its_weights(frozen: bool, autocast: bool, policy: str) -> None:
    module = nn.MultiheadAttention(32, 4, batch_first=True).requires_grad_(not frozen)
    x, memory = (torch.randn(5, 7, 32, requires_grad=True) for _ in range(2))
    spy = SPIES[policy]()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        QuantBackwardWrapper(module, policy=spy)(x, memory, memory)
    # Activations hold 5 images of 7 tokens, so multiples of 35 elements. No weight has such a size.
    assert len(spy.asked) >= 4
    assert all(TensorLayout.base(saved.tensor).numel() % 35 == 0 for saved in spy.asked)


@pytest.mark.parametrize("policy", QUANTIZING)
def test_input_with_the_shape_of_the_weight_is_no_parameter(policy: str) -> None:
    x = torch.randn(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        model = QuantBackwardWrapper(
            nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)), policy=policy)
        with track_saved_memory(model) as report:
            output = model(x)
    # Saved: bfloat16 copies of the input and of the batch norm's input, and two statistics.
    assert report.exact_bytes == 2 * 64 * 64 * 2 + 2 * 64 * 4
    assert output.requires_grad


@pytest.mark.parametrize("policy", QUANTIZING)
def test_weight_of_another_module_passed_as_an_argument_is_kept(policy: str) -> None:
    decoder, embedding = Apply(F.linear), nn.Embedding(32, 32)
    x = torch.randn(4, 32, 32)

    def grad_of_input(module: nn.Module) -> Tensor:
        leaf = x.clone().requires_grad_()
        output = module(leaf, embedding.weight)
        output.backward(output.detach())
        assert leaf.grad is not None
        return leaf.grad

    plain = grad_of_input(decoder)
    with saved_tensors_hooks(skips_parameters, naive_unpack):
        assert not torch.equal(grad_of_input(decoder), plain)  # the control
    spy = SPIES[policy]()
    model = QuantBackwardWrapper(decoder, policy=spy)
    assert torch.equal(grad_of_input(model), plain)
    assert [saved.tensor.shape for saved in spy.asked] == [(128, 32)]


@pytest.mark.parametrize("policy", QUANTIZING)
def test_replaced_parameters_are_found_at_the_next_forward(policy: str) -> None:
    module = nn.Linear(32, 32)
    model = QuantBackwardWrapper(module, policy=policy)
    x = torch.randn(4, 32, 32)
    for _ in range(2):
        module.weight = parameter(32, 32)
        assert torch.equal(
            run(model, x, copied=False).grads["input 0"], run(module, x).grads["input 0"])


@pytest.mark.parametrize("policy", QUANTIZING)
def test_lazy_parameters_are_found_once_they_exist(policy: str) -> None:
    spy = SPIES[policy]()
    model = QuantBackwardWrapper(
        nn.Sequential(nn.LazyLinear(32), nn.LazyBatchNorm1d()), policy=spy)
    x = torch.randn(64, 32)
    grads = run(model, x, copied=False).grads
    assert grads.keys() == {"0.weight", "0.bias", "1.weight", "1.bias", "input 0"}
    assert {saved.tensor.shape for saved in spy.asked} == {(64, 32), (32,)}  # (32,): statistics


@pytest.mark.parametrize("policy", QUANTIZING)
def test_functional_call_keeps_the_given_parameters(policy: str) -> None:
    module, x = nn.Linear(32, 32), torch.randn(4, 32, 32, requires_grad=True)
    weight = torch.randn(32, 32, requires_grad=True)

    def grad_of_input(model: nn.Module, name: str) -> Tensor:
        output = torch.func.functional_call(model, {name: weight}, x)
        return torch.autograd.grad(output.sin().sum(), x)[0]

    expected = grad_of_input(module, "weight")
    model = QuantBackwardWrapper(module, policy=policy)
    assert torch.equal(grad_of_input(model, "module.weight"), expected)


# Functions of a parameter, as factors.


FACTORS: dict[str, Callable[[nn.Parameter], Tensor]] = {
    "itself": lambda w: w, "plus one": lambda w: 1 + w, "cast": lambda w: w.to(torch.bfloat16).float(),
    "reshaped": lambda w: w.view(1, 1, -1), "softplus": lambda w: nn.functional.softplus(w) * 2}


class _Scaled(nn.Module):
    def __init__(self, factor: Callable[[nn.Parameter], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor(self.weight)


@pytest.mark.parametrize("name", FACTORS)
def test_what_a_function_of_a_parameter_multiplies_gets_the_configured_bits(name: str) -> None:
    model = QuantBackwardWrapper(nn.Sequential(nn.Linear(64, 64), _Scaled(FACTORS[name])), seed=0)
    model(torch.randn(4, 32, 64))
    assert "2-bit rotated" in [
        site.stored for site in model.explain().sites.values() if site.op == "mul"]


@pytest.mark.parametrize("batch", [32, 64])
def test_activations_of_a_first_layer_are_no_functions_of_its_parameter(batch: int) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.randn(batch, 64).requires_grad_() * self.layer(x)

    model = QuantBackwardWrapper(Gated(), seed=0)
    model(torch.randn(batch, 64))
    assert "4-bit dithered" in [
        site.stored for site in model.explain().sites.values() if site.op == "mul"]
