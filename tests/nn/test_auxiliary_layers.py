"""Auxiliary layers: outputs are those of ordinary layers, gradients those that the rules say."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from brevitas_bp.errors import SecondDerivativeError
from brevitas_bp.nn import (
    AuxiliaryResidualConv2d,
    AuxiliaryResidualLinear,
    AuxiliaryRun,
    AuxiliarySignConv2d,
    AuxiliarySignLinear,
)

#: Settings of convolutions, each with the shape of an input.
CONVOLUTIONS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "plain": ({"kernel_size": 3}, (2, 4, 7, 6)),
    "1x1": ({"kernel_size": 1, "bias": False}, (2, 4, 5, 5)),
    "stride and padding": ({"kernel_size": 3, "stride": 2, "padding": 1}, (2, 4, 7, 6)),
    "unequal": ({"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0)}, (2, 4, 7, 6)),
    "dilation": ({"kernel_size": 3, "dilation": (2, 1)}, (2, 4, 7, 6)),
    "groups": ({"kernel_size": 3, "groups": 2, "padding": 1}, (2, 4, 7, 6)),
    "depthwise": ({"kernel_size": 3, "groups": 4}, (2, 4, 7, 6)),
    "valid": ({"kernel_size": 3, "padding": "valid"}, (2, 4, 7, 6)),
    "same": ({"kernel_size": 3, "padding": "same"}, (2, 4, 7, 6)),
    "same, even kernel": ({"kernel_size": (4, 2), "padding": "same", "dilation": (1, 3)}, (2, 4, 7, 6)),
    "same, reflected": (
        {"kernel_size": (4, 3), "padding": "same", "padding_mode": "reflect"}, (2, 4, 7, 6)),
    "reflected": ({"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"}, (2, 4, 7, 6)),
    "replicated": ({"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"}, (2, 4, 7, 6)),
    "circular": ({"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"}, (2, 4, 7, 6)),
    "one image": ({"kernel_size": 3, "padding": 1}, (4, 7, 6)),
    "one image, reflected": (
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (4, 7, 6)),
    "no images": ({"kernel_size": 3}, (0, 4, 7, 6))}
LINEARS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "vector": ({}, (4,)), "matrix": ({"bias": False}, (3, 4)), "tokens": ({}, (2, 3, 4)),
    "images": ({}, (2, 3, 5, 4)), "no tokens": ({}, (2, 0, 4))}
# The ordinary layer warns that it may pad a copy.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
CASES = [
    *(pytest.param(nn.Conv2d, *case, id=f"conv, {name}") for name, case in CONVOLUTIONS.items()),
    *(pytest.param(nn.Linear, *case, id=f"linear, {name}") for name, case in LINEARS.items())]

RESIDUAL = {nn.Conv2d: AuxiliaryResidualConv2d, nn.Linear: AuxiliaryResidualLinear}
SIGN = {nn.Conv2d: AuxiliarySignConv2d, nn.Linear: AuxiliarySignLinear}
KINDS = [nn.Conv2d, nn.Linear]


def whole(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Whole numbers, so that sums are exact in any order and gradients can be compared bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def ordinary(kind: Any, settings: dict[str, Any]) -> Any:
    layer = kind(4, 8, **settings).double()
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(whole(tuple(parameter.shape), i))
    return layer


def same_as(layer: Any, made: Any) -> Any:
    made = made.to(layer.weight.dtype)
    made.load_state_dict(layer.state_dict())
    return made


def run_once(layer: Any, x: Tensor, seed: int = 9) -> dict[str, Tensor]:
    """Returns output and gradients for a gradient of whole numbers."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(whole(tuple(y.shape), seed, y.dtype))
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad}
    return found | {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def at_another_input(layer: Any, x: Tensor, a: Tensor) -> dict[str, Tensor]:
    """The oracle: output and gradients at ``x``, but those of the weight at ``a``, by plain autograd."""
    found = run_once(copy.deepcopy(layer), x)
    return found | {"weight": run_once(copy.deepcopy(layer), a)["weight"]}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def within(layer: Any, a: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns a layer that runs within its run, which begins with ``a``."""
    class Running(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with layer.run.over(a):
                return layer(x)

        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            return layer.named_parameters()

    return Running()


@pytest.mark.parametrize(("kind", "settings", "shape"), CASES)
def test_a_run_of_one_layer_is_the_ordinary_layer(
        kind: Any, settings: dict[str, Any], shape: tuple[int, ...]) -> None:
    layer, x = ordinary(kind, settings), whole(shape, 5)
    made = same_as(layer, RESIDUAL[kind](4, 8, **settings, run=AuxiliaryRun()))
    assert_equal(run_once(within(made, x), x), run_once(layer, x))


@pytest.mark.parametrize(("kind", "settings", "shape"), CASES)
def test_the_weight_takes_its_gradient_at_the_auxiliary_activation(
        kind: Any, settings: dict[str, Any], shape: tuple[int, ...]) -> None:
    layer, x, a = ordinary(kind, settings), whole(shape, 5), whole(shape, 6)
    made = same_as(layer, RESIDUAL[kind](4, 8, **settings, run=AuxiliaryRun()))
    expected = at_another_input(layer, x, a)
    assert_equal(run_once(within(made, a), x), expected)
    if x.numel():
        # The control: at the true input, the gradient is another.
        assert not torch.equal(expected["weight"], run_once(layer, x)["weight"])


@pytest.mark.parametrize(("kind", "settings", "shape"), CASES)
def test_an_auxiliary_activation_of_zero_gives_no_gradient(
        kind: Any, settings: dict[str, Any], shape: tuple[int, ...]) -> None:
    layer, x = ordinary(kind, settings), whole(shape, 5)
    made = same_as(layer, RESIDUAL[kind](4, 8, **settings, run=AuxiliaryRun()))
    assert not run_once(within(made, torch.zeros_like(x)), x)["weight"].any()


def signs(x: Tensor, relu: bool) -> Tensor:
    return (x > 0).to(x) if relu else (x > 0).to(x) * 2 - 1


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("kind", "settings", "shape"), CASES)
def test_sign_layers(
        kind: Any, settings: dict[str, Any], shape: tuple[int, ...], relu: bool) -> None:
    layer, x = ordinary(kind, settings), whole(shape, 5)
    made = same_as(layer, SIGN[kind](4, 8, **settings, relu=relu))
    # With epsilon 0.01 the output is not whole, so compare it apart.
    s = signs(x, relu)
    expected = at_another_input(layer, x, s)
    found = run_once(made, x)
    assert torch.equal(found.pop("y"), layer(x + 0.01 * s))
    del expected["y"]
    assert_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("epsilon", "lr_expansion"), [(0.5, 8.0), (0.25, 1.0), (2, 3)])
def test_settings_of_sign_layers(kind: Any, epsilon: float, lr_expansion: float) -> None:
    settings, shape = ({"kernel_size": 3}, (2, 4, 5, 5)) if kind is nn.Conv2d else ({}, (3, 4))
    layer, x = ordinary(kind, settings), whole(shape, 5)
    made = same_as(layer, SIGN[kind](4, 8, **settings, epsilon=epsilon, lr_expansion=lr_expansion))
    s = signs(x, False)
    expected = at_another_input(layer, x + epsilon * s, s)
    expected["weight"] *= epsilon * lr_expansion
    assert_equal(run_once(made, x), expected)


def test_zero_counts_as_not_positive_and_nan_stays() -> None:
    layer = AuxiliarySignLinear(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1)
    layer(torch.tensor([[0.0, -0.0, 3.0]])).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.tolist() == [[-1, -1, 1]]
    assert layer(torch.tensor([1.0, math.nan, 1.0])).isnan().all()
    assert layer(torch.tensor([1.0, math.inf, 1.0])).isinf().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_signs_are_those_of_floats(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"takes tensors of floats, got {dtype}"):
        AuxiliarySignLinear(4, 4)(torch.ones(2, 4, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_sign_layers_are_the_same_function_in_evaluation(kind: Any) -> None:
    settings, shape = ({"kernel_size": 3}, (2, 4, 5, 5)) if kind is nn.Conv2d else ({}, (3, 4))
    made, x = SIGN[kind](4, 8, **settings), torch.randn(shape)
    with_gradients = made(x).detach()
    with torch.no_grad():
        assert torch.equal(made.eval()(x), with_gradients)
    with torch.inference_mode():
        assert torch.equal(made(x), with_gradients)
    plain = kind(4, 8, **settings)
    plain.load_state_dict(made.state_dict())
    assert not torch.equal(plain(x), with_gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind: Any, dtype: torch.dtype) -> None:
    settings, shape = ({"kernel_size": 3}, (2, 4, 5, 5)) if kind is nn.Conv2d else ({}, (3, 4))
    layer, x = ordinary(kind, settings).to(dtype), whole(shape, 5, dtype)
    residual = same_as(layer, RESIDUAL[kind](4, 8, **settings, run=AuxiliaryRun()))
    found = run_once(within(residual, x), x)
    assert_equal(found, run_once(layer, x))
    assert all(value.dtype == dtype for value in found.values())
    found = run_once(same_as(layer, SIGN[kind](4, 8, **settings)), x)
    assert all(value.dtype == dtype for value in found.values())
    assert torch.equal(found["weight"], at_another_input(layer, x, signs(x, False))["weight"])


@pytest.mark.parametrize("form", ["channels_last", "gapped", "expanded"])
def test_memory_layouts(form: str) -> None:
    x = whole((2, 4, 6, 6), 5)
    x = {"channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
         "gapped": lambda: torch.stack((x, x), -1)[..., 0],
         "expanded": lambda: x[:1].expand(2, -1, -1, -1)}[form]()
    layer = ordinary(nn.Conv2d, {"kernel_size": 3})
    if form == "channels_last":
        layer = layer.to(memory_format=torch.channels_last)
    sign = AuxiliarySignConv2d(4, 8, 3)
    found = run_once(same_as(layer, sign), x)
    assert torch.equal(found["weight"], at_another_input(layer, x, signs(x, False))["weight"])
    made = same_as(layer, AuxiliaryResidualConv2d(4, 8, 3, run=AuxiliaryRun()))
    assert_equal(run_once(within(made, x), x), run_once(layer, x))


@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_gradients_that_are_needed(kind: Any, frozen: str) -> None:
    settings, shape = ({"kernel_size": 3}, (2, 4, 5, 5)) if kind is nn.Conv2d else ({}, (3, 4))
    run = AuxiliaryRun()
    for layer in (RESIDUAL[kind](4, 8, **settings, run=run), SIGN[kind](4, 8, **settings)):
        x = torch.randn(shape, requires_grad=frozen != "input")
        if frozen != "input":
            getattr(layer, frozen).requires_grad_(False)
        with run.over(x):
            layer(x).sum().backward()
        given = {"weight": layer.weight.grad, "bias": layer.bias.grad, "input": x.grad}
        assert {name for name, grad in given.items() if grad is None} == {frozen}


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_weight_needs_no_run_and_saves_no_activation(kind: Any) -> None:
    settings, shape = ({"kernel_size": 3}, (2, 4, 5, 5)) if kind is nn.Conv2d else ({}, (3, 4))
    for layer in (RESIDUAL[kind](4, 8, **settings, run=AuxiliaryRun()), SIGN[kind](4, 8, **settings)):
        layer.weight.requires_grad_(False)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            layer(torch.randn(shape, requires_grad=True))
        assert [x.shape for x in saved] == [layer.weight.shape]


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_refused(kind: Any) -> None:
    settings, shape = ({"kernel_size": 3}, (2, 4, 5, 5)) if kind is nn.Conv2d else ({}, (3, 4))
    x, run = torch.randn(shape, requires_grad=True), AuxiliaryRun()
    for layer in (RESIDUAL[kind](4, 8, **settings, run=run), SIGN[kind](4, 8, **settings)):
        with run.over(x):
            y = layer(x).square().sum()
        for asked in (x, layer.weight, layer.bias):
            once, = torch.autograd.grad(y, asked, create_graph=True)
            plain, = torch.autograd.grad(y, asked, retain_graph=True)
            assert torch.equal(once, plain)
            with pytest.raises(SecondDerivativeError, match="differentiate twice"):
                once.square().sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_backward_twice(kind: Any) -> None:
    settings, shape = ({"kernel_size": 3}, (2, 4, 5, 5)) if kind is nn.Conv2d else ({}, (3, 4))
    x, run = torch.randn(shape), AuxiliaryRun()
    for layer in (RESIDUAL[kind](4, 8, **settings, run=run), SIGN[kind](4, 8, **settings)):
        with run.over(x):
            y = layer(x).sum()
        first, again = (
            torch.autograd.grad(y, layer.weight, retain_graph=retain)[0] for retain in (True, False))
        assert torch.equal(first, again)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("setting", "value"), [
    ("epsilon", 0.0), ("epsilon", -0.01), ("epsilon", math.nan), ("epsilon", math.inf),
    ("epsilon", "0.01"), ("lr_expansion", 0), ("lr_expansion", -1.0), ("lr_expansion", True)])
def test_settings_that_make_no_sense(kind: Any, setting: str, value: Any) -> None:
    arguments = (4, 4, 3) if kind is nn.Conv2d else (4, 4)
    with pytest.raises(ValueError, match=rf"AuxiliarySign.*{setting} must be a finite number > 0"):
        SIGN[kind](*arguments, **{setting: value})
    with pytest.raises(TypeError, match="relu must be a bool"):
        SIGN[kind](*arguments, relu="yes")
    with pytest.raises(TypeError, match="run must be an AuxiliaryRun"):
        RESIDUAL[kind](*arguments, run=None)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_move_both_ways(kind: Any) -> None:
    arguments = (4, 4, 3) if kind is nn.Conv2d else (4, 4)
    plain = kind(*arguments)
    for made in (RESIDUAL[kind](*arguments, run=AuxiliaryRun()), SIGN[kind](*arguments)):
        assert list(made.state_dict()) == list(plain.state_dict())
        made.load_state_dict(plain.state_dict())
        plain.load_state_dict(made.state_dict())
        assert isinstance(made, kind)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_a_run_of_their_own_that_their_layers_share(copied: Any) -> None:
    run = AuxiliaryRun()
    net = nn.Sequential(*(AuxiliaryResidualLinear(4, 4, run=run) for _ in range(2)))
    with run.over(torch.ones(3, 4)):
        other: Any = copied(net)
        assert other[0].run is other[1].run is not run and not other[0].run.is_open
        with pytest.raises(RuntimeError, match="not open"):
            other[0](torch.ones(3, 4))
    with other[0].run.over(torch.ones(3, 4)):
        other(torch.ones(3, 4)).sum().backward()
    assert other[1].weight.grad is not None and net[1].weight.grad is None  # pyright: ignore


@pytest.mark.parametrize("kind", KINDS)
def test_parametrized_weights(kind: Any) -> None:
    arguments, shape = ((4, 4, 3), (2, 4, 5, 5)) if kind is nn.Conv2d else ((4, 4), (3, 4))
    x, run = whole(shape, 5), AuxiliaryRun()
    plain = kind(*arguments).double()
    for made in (RESIDUAL[kind](*arguments, run=run), SIGN[kind](*arguments)):
        expected = run_once(weight_norm(copy.deepcopy(plain)), x)
        with run.over(x):
            found = run_once(weight_norm(same_as(plain, made)), x)
        assert found.keys() == expected.keys() and torch.allclose(found["x"], expected["x"])
        if hasattr(made, "run"):
            assert_equal(found, expected)


def test_vmap_is_refused_in_words() -> None:
    layer = AuxiliarySignLinear(4, 4)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(layer)(torch.randn(3, 4))


def test_derivatives_of_torch_func() -> None:
    layer, x = AuxiliarySignLinear(4, 2), whole((3, 4), 5, torch.float32)
    grads = torch.func.grad(lambda parameters: torch.func.functional_call(
        layer, parameters, (x,)).sum())(dict(layer.named_parameters()))
    assert torch.equal(grads["weight"], signs(x, False).sum(0).expand(2, 4))
