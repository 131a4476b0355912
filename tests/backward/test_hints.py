"""What a pass knows about a tensor from other stored tensors, and when it uses that."""

import gc
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import (
    OpAware,
    QuantBackwardWrapper,
    SavedTensor,
    check_gradients,
    track_saved_memory,
)
from brevitas_bp.backward.seam import listening
from brevitas_bp.codec import Copy
from brevitas_bp.quant import (
    RotatedNormal2DynamicActPerBucketFloat,
    RotatedNormal4DynamicActPerBucketFloat,
    ShiftedUint2Avg4DynamicActPerBucketFloatStochastic,
    ShiftedUint2DynamicActPerBucketFloatStochastic,
)
from tests.backward.support import Apply, Gated, assert_unbiased

WIDTH = 256
Function = Callable[[Tensor], Tensor]


def stored(module: nn.Module, x: Tensor, **options: Any) -> list[tuple[str, str]]:
    """Returns operation and codec of what the layers with weights save."""
    model, names = QuantBackwardWrapper(module, **options), []
    with listening(model, lambda saved, packed, *_: names.append((saved.op, packed.codec.name))):
        model(x)
    return [(op, name) for op, name in names if op in ("linear", "conv2d") and "exact" not in name]


def given_names(module: nn.Module, x: Tensor, **options: Any) -> list[str]:
    return [name.partition(", ")[2] for _, name in stored(module, x, **options)]


def between(function: Function) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Apply(function), nn.Linear(WIDTH, 8))


CASES: dict[str, tuple[Function, str]] = {
    "relu": (F.relu, "given the mask"),
    "relu in place": (lambda x: F.relu_(x + 0), "given the mask"),
    "relu in another shape": (lambda x: F.relu(x.view(-1, 2, WIDTH)).view(-1, WIDTH), "given the mask"),
    "silu": (F.silu, "given the derivative"),
    "silu in place": (lambda x: F.silu(x + 0, inplace=True), "given the derivative"),
    "gelu": (F.gelu, "given the derivative"),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), "given the derivative"),
    "tanh": (torch.tanh, ""),
    "clamp": (lambda x: x.clamp(min=0), ""),
    "relu6": (F.relu6, ""),
    "leaky": (F.leaky_relu, ""),
    "relu that changed": (lambda x: F.relu(x).add_(1), ""),
    "a part of relu": (lambda x: F.relu(torch.cat((x, x), 1))[:, WIDTH:], ""),
    "relu in another order": (lambda x: F.relu(x.view(-1, WIDTH).t()).t(), ""),
    "dropout after relu": (lambda x: F.dropout(F.relu(x), 0.5), "")}


@pytest.mark.parametrize(("function", "expected"), CASES.values(), ids=CASES)
def test_which_outputs_are_given(function: Function, expected: str) -> None:
    first, last = given_names(between(function), torch.randn(32, WIDTH))
    assert (first, last) == ("", expected)


@pytest.mark.parametrize("policy", [OpAware(hints=False), "all", "all_but_relu"])
def test_only_the_default_policy_asks_for_it(policy: Any) -> None:
    assert not any(given_names(between(F.relu), torch.randn(32, WIDTH), policy=policy))


def test_gradients_without_hints_are_those_of_before() -> None:
    x, module = torch.randn(32, WIDTH), between(F.relu)
    first = QuantBackwardWrapper(module, policy=OpAware(hints=False), seed=3)
    first(x).square().sum().backward()
    grads = [p.grad for p in module.parameters()]
    module.zero_grad()
    QuantBackwardWrapper(module, seed=3)(x).square().sum().backward()
    # The first layer does not save what an activation function made.
    assert [torch.equal(a, b) for a, b in zip(grads, [p.grad for p in module.parameters()])
            if a is not None and b is not None] == [True, True, False, True]


def convolutions(function: Function) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), Apply(function), nn.Conv2d(16, 16, 3, groups=16), Apply(function),
        nn.Conv2d(16, 8, 1), nn.Flatten())


@pytest.mark.parametrize("size", [8, 9, 12, 20])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("function", "least"), [(F.relu, 1.1), (F.silu, 1.1)], ids=["relu", "silu"])
def test_convolutions_have_less_error(
        function: Function, least: float, channels_last: bool, size: int) -> None:
    model = convolutions(function)
    x = torch.randn(16, 3, size, size)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)

    def error(policy: OpAware) -> float:
        wrapped = QuantBackwardWrapper(
            model, RotatedNormal2DynamicActPerBucketFloat, policy=policy, seed=1)
        # The last layer's weight sees nothing but the rounding of its own input.
        total = 0.0
        for _ in range(24):
            model.zero_grad()
            wrapped(x).square().mean().backward()
            grad = model[4].weight.grad
            assert isinstance(grad, Tensor)
            total += float((grad - exact).square().sum())
        return total

    model(x).square().mean().backward()
    exact = model[4].weight.grad.clone()  # type: ignore[union-attr, operator]
    assert error(OpAware(hints=False)) > least * error(OpAware())


class SelfProduct(nn.Module):
    """A layer whose gradient multiplies the rounding of an output by that of its derivative."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(32, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        z = self.function(self.first(x))
        return (self.last(z) * z).sum(1)


@pytest.mark.parametrize("function", [F.relu, F.silu, F.gelu])
def test_gradients_stay_unbiased(function: Function) -> None:
    assert_unbiased(
        SelfProduct(function), torch.randn(16, 32, generator=torch.Generator().manual_seed(1)))


def test_a_pass_of_its_own_has_hints_of_its_own() -> None:
    # The mask belongs to a pass that has ended.
    before = F.relu(torch.randn(32, WIDTH, requires_grad=True))
    assert given_names(nn.Linear(WIDTH, 8), before) == [""]


@pytest.mark.parametrize("function", [F.relu, F.silu])
def test_nothing_is_kept_longer(function: Function) -> None:
    module, payloads = between(function), []
    model = QuantBackwardWrapper(module)
    with listening(model, lambda saved, packed, *_: payloads.extend(
            weakref.ref(t) for t in packed.tensors if packed.codec.lossy or packed.codec.owns)):
        out = model(torch.randn(32, WIDTH))
    assert payloads and any(ref() is not None for ref in payloads)
    out.sum().backward()
    gc.collect()
    held = [ref() for ref in payloads]
    assert all(t is None or any(t is p for p in module.parameters()) for t in held)


def test_small_and_odd_networks_still_check() -> None:
    for width in (3, 17, 100, 257):
        module = nn.Sequential(
            nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        check = check_gradients(
            QuantBackwardWrapper(module), torch.randn(64, 8), lambda m, x: m(x).square().mean())
        assert "nan" not in str(check)


def mean_gradient(module: nn.Module, forward: Callable[[nn.Module], Tensor]) -> float:
    """Returns how far the mean of 40 gradients of the last layer's weight is from the exact gradient."""
    weight = list(module.parameters())[-2]

    def gradient(model: nn.Module) -> Tensor:
        return torch.autograd.grad(forward(model), weight)[0]

    exact = gradient(module)
    model = QuantBackwardWrapper(module, seed=1)
    mean = sum(gradient(model) for _ in range(40)) / 40
    return float((mean - exact).norm() / exact.norm())


class Halves(nn.Module):
    """A ReLU in place on every second row; the next layer reads other elements of the same memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) + 0
        F.relu_(h[::2])
        return self.last(h[:len(h) // 2])


def test_a_view_with_gaps_is_another_tensor() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert mean_gradient(Halves(), lambda m: m(x).square().sum()) < 0.15


class Shifted(nn.Module):
    """Changes the output of a ReLU without autograd's knowledge, before the next layer reads it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        y.data.add_(1)
        return self.last(y)


def test_a_change_that_raises_no_version_is_seen() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert mean_gradient(Shifted(), lambda m: m(x).square().sum()) < 0.05


class Replacing(OpAware):
    """Stores what activation functions save in another way than the default policy."""

    def __init__(self, codec: Any) -> None:
        super().__init__()
        object.__setattr__(self, "codec", codec)

    def decide(self, saved: SavedTensor) -> Any:
        decision = super().decide(saved)
        replaced = saved.op == "relu" or saved.role == "derivative"
        return decision._replace(codec=self.codec) if replaced else decision  # type: ignore[attr-defined]


@pytest.mark.parametrize("codec", [Copy(), None])
@pytest.mark.parametrize("size", [4, 64])
@pytest.mark.parametrize("function", [F.relu, F.silu])
def test_other_codecs_of_a_mask_give_no_hints(function: Function, size: int, codec: Any) -> None:
    module, x = between(function), torch.randn(size, WIDTH)
    grads = []
    for listener in (False, True):
        model = QuantBackwardWrapper(module, policy=Replacing(codec), seed=2)
        with ExitStack() as stack:
            if listener:
                stack.enter_context(track_saved_memory(model))
            grads.append(torch.autograd.grad(model(x).square().sum(), list(module.parameters())))
    assert all(map(torch.equal, *grads))
    # A copy of a derivative tells as much as its codes.
    copied = function is F.silu and codec is not None
    assert any(given_names(module, x, policy=Replacing(codec))) == copied


@pytest.mark.parametrize(("options", "name"), [
    ({"bucket_size": 512}, "given the derivative"),
    ({"bucket_size": 1024}, "given the derivative"),
    ({"act_quant": ShiftedUint2Avg4DynamicActPerBucketFloatStochastic},
     "means of 4, given the derivative"),
    ({"bucket_size": None}, "")])
def test_which_buckets_store_differences(
        options: dict[str, Any], name: str) -> None:
    module = nn.Sequential(nn.Linear(64, 1024), nn.SiLU(), nn.Linear(1024, 8))
    options = {"act_quant": ShiftedUint2DynamicActPerBucketFloatStochastic, **options}
    assert given_names(module, torch.randn(8, 64), **options)[1] == name


def test_averages_of_differences_tell_more_than_averages() -> None:
    x, errors = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), []
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 1024), nn.SiLU(), nn.Linear(1024, 8))
    exact = torch.autograd.grad(module(x).square().sum(), module[2].weight)[0]
    for hints in (True, False):
        model = QuantBackwardWrapper(
            module, ShiftedUint2Avg4DynamicActPerBucketFloatStochastic, policy=OpAware(hints=hints),
            seed=1)
        found = torch.autograd.grad(model(x).square().sum(), module[2].weight)[0]
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[0] < errors[1] / 2


def test_small_planes_store_differences_in_units_of_channels() -> None:
    x = torch.randn(16, 3, 8, 8)
    assert given_names(convolutions(F.silu), x) == ["", *["given the derivative"] * 2]
    assert given_names(convolutions(F.relu), x) == ["", *["given the mask"] * 2]


@pytest.mark.parametrize("centre", [0.0, 2.4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_small_planes_of_very_different_scale_have_no_more_error(
        channels_last: bool, centre: float) -> None:
    # At 2.4 the derivative of SiLU is flat, and tells nothing.
    torch.manual_seed(0)
    scale = 10.0 ** torch.linspace(-4, 0.5, 64).view(1, 64, 1, 1)
    y = (centre + (0.02 if centre else 1.0) * torch.randn(32, 64, 6, 6)) * (1.0 if centre else scale)
    if channels_last:
        y = y.contiguous(memory_format=torch.channels_last)
    module = nn.Sequential(nn.SiLU(), nn.Conv2d(64, 64, 3, groups=64, bias=False))
    y.requires_grad_()
    weight, errors = module[1].weight, []
    exact = torch.autograd.grad(module(y).square().sum(), weight)[0]
    for hints in (False, True):
        model = QuantBackwardWrapper(
            module, RotatedNormal2DynamicActPerBucketFloat, policy=OpAware(hints=hints), seed=1)
        found = torch.stack([
            torch.autograd.grad(model(y).square().sum(), weight)[0] - exact for _ in range(6)])
        errors.append((found.square().sum((0, 2, 3, 4)) / exact.square().sum((1, 2, 3))).max())
    assert errors[1] < 2 * errors[0]


def factors(module: nn.Module, x: Tensor, **options: Any) -> list[str]:
    """Returns the codecs of the factors that products save."""
    model, names = QuantBackwardWrapper(module, **options), []
    with listening(model, lambda saved, packed, *_: names.append((saved.op, packed.codec.name))):
        model(x)
    return [name for op, name in names if op == "mul"]


FACTORS: dict[str, tuple[Function, dict[str, Any], str]] = {
    "silu": (F.silu, {}, "3-bit rotated, given the derivative"),
    "gelu": (F.gelu, {}, "4-bit rotated, given the derivative"),
    "more bits": (
        F.silu, {"policy": OpAware(multiplier_bits=6)}, "5-bit rotated, given the derivative"),
    "one bit": (F.silu, {"policy": OpAware(multiplier_bits=1), "bit_width": 1},
                "1-bit rotated, given the derivative"),
    "stochastic": (F.silu, {"act_quant": ShiftedUint2DynamicActPerBucketFloatStochastic},
                   "4-bit stochastic, given the derivative"),
    "chosen": (
        F.silu, {"policy": OpAware(multiplier_quant=RotatedNormal4DynamicActPerBucketFloat)},
        "4-bit rotated, given the derivative"),
    "relu": (F.relu, {}, "4-bit dithered"),
    "no hints": (F.silu, {"policy": OpAware(hints=False)}, "4-bit dithered"),
    "replaced": (F.silu, {"policy": None}, "exact")}


class ExactFactors(OpAware):
    def decide(self, saved: SavedTensor) -> Any:
        decision = super().decide(saved)
        return decision._replace(codec=Copy()) if saved.op == "mul" else decision


@pytest.mark.parametrize(("function", "options", "name"), FACTORS.values(), ids=FACTORS)
def test_factors(function: Function, options: dict[str, Any], name: str) -> None:
    if "policy" in options and options["policy"] is None:
        options = {"policy": ExactFactors()}
    names = factors(Gated(function), torch.randn(64, 32), **options)
    assert len(names) == 2 and sum(n.startswith(name) for n in names) == (1 if "given" in name else 2)


class Excited(nn.Module):
    """Squeeze-and-excitation: each number multiplies 256 elements of a channel."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.squeeze = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.first(x))
        return y * self.squeeze(y.mean((2, 3), keepdim=True)).sigmoid()


@pytest.mark.parametrize(("function", "given"), [
    (F.silu, "given the derivative"), (F.gelu, "given the derivative"), (F.relu, "given the mask")])
def test_factors_whose_roundings_are_summed(function: Function, given: str) -> None:
    module, x = Excited(function), torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert f"2-bit rotated, {given}" in factors(module, x)
    parameter = module.squeeze.bias
    assert parameter is not None
    exact = torch.autograd.grad(module(x).square().sum(), parameter)[0]
    errors = []
    for hints in (True, False):
        model = QuantBackwardWrapper(module, policy=OpAware(hints=hints), seed=1)
        found = [torch.autograd.grad(model(x).square().sum(), parameter)[0] for _ in range(64)]
        errors.append(sum(float((f - exact).square().sum()) for f in found))
    # The rest of the error is that of the scale and of derivatives. With ReLU, most of it.
    assert errors[0] < (0.9 if function is F.relu else 0.6) * errors[1]


@pytest.mark.parametrize("function", [F.silu, F.gelu])
def test_factors_have_less_error_in_no_more_bytes(function: Function) -> None:
    module, x = Gated(function), torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    exact = torch.autograd.grad(module(x).square().sum(), module.up.weight)[0]
    errors, sizes = [], []
    for hints in (True, False):
        model = QuantBackwardWrapper(module, policy=OpAware(hints=hints), seed=1)
        found = [torch.autograd.grad(model(x).square().sum(), module.up.weight)[0] for _ in range(24)]
        errors.append(sum(float((f - exact).square().sum()) for f in found))
        with track_saved_memory(model) as report:
            output = model(x)
        sizes.append(report.stored_bytes)
        del output
    assert errors[0] < 0.75 * errors[1]
    # One bit of 64 rows in 256 columns less, of SiLU; a bit for each of 64 chunks more.
    assert sizes[0] <= sizes[1] + 8 - (64 * 256 // 8 if function is F.silu else 0)


@pytest.mark.parametrize("function", [F.silu, F.gelu])
def test_gradients_of_gated_units_stay_unbiased(function: Function) -> None:
    assert_unbiased(Gated(function), torch.randn(16, 32, generator=torch.Generator().manual_seed(1)))
