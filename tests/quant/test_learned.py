"""Learned quantizers in Brevitas' layers."""

import copy
from typing import Any

import pytest
import torch
from brevitas.inject.enum import QuantType
from brevitas.nn import QuantConv2d, QuantConvTranspose2d, QuantLinear
from brevitas.quant import Int8ActPerTensorFloat
from brevitas.quant_tensor import IntQuantTensor
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper, UnknownNameError
from brevitas_bp.core.nested_floor import nested_floor
from brevitas_bp.quant import (
    LearnedFloorIntBias,
    LearnedFloorIntWeightPerChannelFloat,
    LearnedFloorIntWeightPerColumnFloat,
    LearnedFloorIntWeightPerRowFloat,
    LearnedFloorIntWeightPerTensorFloat,
    learned,
)
from brevitas_bp.quant.learned_proxy import PerInputIntQuantTensor
from tests.strategies import normals

LINEAR: dict[str, tuple[Any, tuple[int, ...], bool]] = {
    # config -> shape of the scale of a (4, 6) weight, and whether an output has a scale
    "tensor": (LearnedFloorIntWeightPerTensorFloat, (), True),
    "row": (LearnedFloorIntWeightPerRowFloat, (1, 6), False),
    "column": (LearnedFloorIntWeightPerColumnFloat, (4, 1), True)}
SCALE = "weight_quant.tensor_quant.scaling_impl.value"
X = normals((3, 6)).float()


def linear(config: Any = LearnedFloorIntWeightPerRowFloat, **options: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "bias": True, "bias_quant": LearnedFloorIntBias, "weight_scale_init": 0.1,
        "bias_scale_init": 0.05, **options}
    return QuantLinear(6, 4, weight_quant=config, **settings)


@pytest.mark.parametrize("kind", LINEAR)
def test_a_layer_computes_with_the_nested_floor(kind: str) -> None:
    config, shape, _ = LINEAR[kind]
    layer = linear(config, weight_lam=0.5)
    scale = layer.get_parameter(SCALE)
    assert scale.shape == shape
    weight, bias = (
        x.detach().clone().requires_grad_() for x in (layer.weight, layer.bias))
    s = scale.detach().clone().requires_grad_()
    expected = nn.functional.linear(
        X, nested_floor(weight, s, 0.5), nested_floor(bias, torch.tensor(0.05), None))
    output = layer(X)
    assert torch.equal(output, expected)
    output.sum().backward()
    expected.sum().backward()
    assert torch.equal(layer.weight.grad, weight.grad) and torch.equal(scale.grad, s.grad)  # pyright: ignore


def test_weights_and_biases_as_quant_tensors() -> None:
    layer = linear()
    weight, bias = layer.quant_weight(), layer.quant_bias()
    for quantized, parameter in ((weight, layer.weight), (bias, layer.bias)):
        assert isinstance(quantized, IntQuantTensor) and quantized.is_valid and quantized.signed
        assert quantized.int().dtype == torch.int8
        integers = torch.floor(parameter / quantized.scale)
        assert torch.equal(quantized.int().float(), integers)
        assert torch.equal(quantized.value, integers * quantized.scale)
    assert layer.weight_quant.rounding_mode == "FLOOR"
    assert weight.bit_width == 3  # -4 .. 3
    assert bias.bit_width == 4  # -8 .. 7


@pytest.mark.parametrize("kind", LINEAR)
def test_outputs_have_a_scale_only_if_weights_have_it_per_output(kind: str) -> None:
    config, _, per_output = LINEAR[kind]
    layer = linear(config, input_quant=Int8ActPerTensorFloat).eval()
    assert isinstance(layer.quant_weight(), PerInputIntQuantTensor) != per_output
    plain = layer(X)
    layer.return_quant_tensor = True
    if per_output:
        output = layer(X)
        assert isinstance(output, IntQuantTensor) and torch.equal(output.value, plain)
        assert output.is_valid
    else:
        # Brevitas' own error: there is no scale for the output.
        with pytest.raises(AssertionError, match="not correctly configured"):
            layer(X)


def test_brevitas_would_compute_a_wrong_scale() -> None:
    # The control: with a plain IntQuantTensor, the scale of input i is taken for that of output i.
    layer = QuantLinear(
        6, 6, bias=False, weight_quant=LearnedFloorIntWeightPerRowFloat,
        input_quant=Int8ActPerTensorFloat).eval()
    with torch.no_grad():
        layer.get_parameter(SCALE).copy_(torch.linspace(0.05, 0.2, 6)[None])
    x, weight = layer.input_quant(X), layer.quant_weight()
    wrong: Any = nn.functional.linear(x, IntQuantTensor(*weight))  # pyright: ignore
    assert isinstance(wrong, IntQuantTensor) and not wrong.is_valid
    assert type(nn.functional.linear(x, weight)) is Tensor  # pyright: ignore


CONV: dict[str, tuple[Any, tuple[int, ...]]] = {
    "tensor": (LearnedFloorIntWeightPerTensorFloat, ()),
    "row": (LearnedFloorIntWeightPerRowFloat, (1, 1, 3, 1)),
    "column": (LearnedFloorIntWeightPerColumnFloat, (1, 1, 1, 5)),
    "channel": (LearnedFloorIntWeightPerChannelFloat, (1, 2, 1, 1))}


@pytest.mark.parametrize("kind", CONV)
def test_convolutions(kind: str) -> None:
    config, shape = CONV[kind]
    layer = QuantConv2d(
        2, 4, (3, 5), bias=True, weight_quant=config, bias_quant=LearnedFloorIntBias,
        weight_scale_init=0.1)
    assert layer.get_parameter(SCALE).shape == shape and layer.quant_weight().is_valid
    layer(torch.randn(1, 2, 8, 8)).sum().backward()
    assert layer.get_parameter(SCALE).grad is not None


def test_transposed_convolutions_keep_their_input_channels_too() -> None:
    layer = QuantConvTranspose2d(2, 4, 3, weight_quant=LearnedFloorIntWeightPerChannelFloat)
    assert layer.get_parameter(SCALE).shape == (2, 1, 1, 1)
    layer(torch.randn(1, 2, 8, 8))


def test_loading_keeps_the_parameter_that_the_optimizer_holds() -> None:
    layer = linear().double()
    scale = layer.get_parameter(SCALE)
    state = {name: x.clone() for name, x in layer.state_dict().items()}
    state[SCALE].fill_(0.3)
    layer.load_state_dict(state)
    assert layer.get_parameter(SCALE) is scale
    assert scale.dtype == torch.float64 and (scale == 0.3).all()


def test_copies_casts_and_modes() -> None:
    layer = linear()
    with torch.no_grad():
        layer.get_parameter(SCALE).mul_(2)
    again = copy.deepcopy(layer)
    assert torch.equal(again(X), layer(X))
    assert again.get_parameter(SCALE) is not layer.get_parameter(SCALE)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cast = copy.deepcopy(layer).to(dtype)
        cast.load_state_dict(cast.state_dict())
        assert cast(X.to(dtype)).dtype == cast.get_parameter(SCALE).dtype == dtype
    assert torch.equal(layer.eval()(X), layer.train()(X))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(X).dtype == torch.bfloat16


def test_layers_may_share_a_quantizer() -> None:
    first = linear()
    second = QuantLinear(6, 2, bias=False, weight_quant=first.weight_quant)
    assert second.get_parameter(SCALE) is first.get_parameter(SCALE)
    (first(X).sum() + second(X).sum()).backward()
    with pytest.raises(ValueError, match=r"share a quantizer must have scales of one shape.*\[1, 5\]"):
        QuantLinear(5, 2, bias=False, weight_quant=first.weight_quant)


def test_without_a_bias_and_switched_off() -> None:
    assert linear(bias=False)(X).shape == (3, 4)
    off = linear(weight_quant_type=QuantType.FP, bias_quant=None)
    assert torch.equal(off(X), nn.functional.linear(X, off.weight, off.bias))


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "bit width": ({"weight_bit_width": 4}, UnknownNameError, "'bit_width'.*no clamp"),
    "misspelt": ({"weight_lamb": 1.0}, UnknownNameError, "no setting 'lamb'; did you mean 'lam'"),
    "bias": ({"bias_lamb": 1.0}, UnknownNameError, "no setting 'lamb'; did you mean 'lam'"),
    "unsigned": ({"weight_signed": False}, ValueError, "signed = False would do nothing"),
    "nearest": ({"weight_float_to_int_impl_type": "round"}, ValueError, "always rounds down"),
    "channel": ({"weight_granularity": "channel"}, ValueError, "can have scalar or row or column"),
    "lam": ({"weight_lam": -1.0}, ValueError, "lam must be >= 0"),
    "scale": ({"weight_scale_init": 0.0}, ValueError, "scale_init must be"),
    "ternary": ({"weight_quant_type": QuantType.TERNARY}, ValueError, "quant_type INT, or FP")}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_refused(case: str) -> None:
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        linear(**options)


def test_settings_in_a_class_body() -> None:
    class Mine(LearnedFloorIntWeightPerRowFloat):
        lam = 1e-9
        granularity = "column"
        unanimity = False

    quantizer = linear(Mine).weight_quant.tensor_quant
    assert (quantizer.lam, quantizer.unanimity) == (1e-9, False)
    assert quantizer.scaling_impl.value.shape == (4, 1)


def test_every_config_says_what_it_is() -> None:
    assert all(getattr(learned, name).__doc__ for name in learned.__all__)


def test_exact_gradients_in_the_wrapper() -> None:
    net = nn.Sequential(linear(weight_lam=0.1), nn.ReLU(), nn.Linear(4, 2))

    def gradients(model: nn.Module) -> list[Tensor]:
        net.zero_grad()
        model(X).square().sum().backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    plain = gradients(net)
    assert len(plain) == 6
    for ours, exact in zip(gradients(QuantBackwardWrapper(net, policy="exact")), plain):
        assert torch.equal(ours, exact)


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_a_compiled_layer_has_the_same_gradients() -> None:
    torch._dynamo.reset()
    layer = linear(weight_lam=0.1)

    def gradients(model: Any) -> list[Tensor]:
        layer.zero_grad()
        model(X).square().sum().backward()
        return [p.grad.clone() for p in layer.parameters() if p.grad is not None]

    plain = gradients(layer)
    ours = gradients(torch.compile(layer, backend="aot_eager", fullgraph=True))
    assert len(plain) == 4 and all(torch.equal(a, b) for a, b in zip(ours, plain))
