"""Bucket quantizers in Brevitas' own layers and tools."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from brevitas.nn import (
    QuantConv2d,
    QuantEltwiseAdd,
    QuantHardTanh,
    QuantIdentity,
    QuantLinear,
    QuantReLU,
    QuantSigmoid,
)
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper, seeded
from brevitas_bp.quant import (
    ShiftedUint2DynamicActPerBucketFloat,
    ShiftedUint2Mix4DynamicActPerBucketFloatStochastic,
    ShiftedUint4DynamicActPerBucketFloatStochastic,
)
from brevitas_bp.quant_tensor import BucketwiseIntQuantTensor
from tests.strategies import normals

with warnings.catch_warnings():
    # Warnings about Brevitas' own deprecated modules, and about packages that it could use.
    warnings.simplefilter("ignore")
    from brevitas.graph.calibrate import calibration_mode, quantization_status_manager
    from brevitas.graph.quantize import layerwise_quantize

STOCHASTIC = ShiftedUint4DynamicActPerBucketFloatStochastic
MIXED = ShiftedUint2Mix4DynamicActPerBucketFloatStochastic


def quantized(x: Tensor, config: Any = STOCHASTIC, **overrides: Any) -> Tensor:
    """Returns the value of the quantizer alone."""
    with seeded(1):
        return config.let(**overrides).tensor_quant(x)[0]


def run(layer: nn.Module, x: Tensor) -> Tensor:
    with seeded(1):
        return layer(x)


@pytest.fixture
def x() -> Tensor:
    return normals((3, 8, 8, 8)).float()


def test_quant_identity_is_the_quantizer(x: Tensor) -> None:
    layer = QuantIdentity(STOCHASTIC, return_quant_tensor=False)
    assert torch.equal(run(layer, x), quantized(x))


ACTIVATIONS: dict[str, tuple[Callable[..., nn.Module], Callable[[Tensor], Tensor], dict[str, Any]]] = {
    "relu": (QuantReLU, torch.relu, {}),
    "sigmoid": (QuantSigmoid, torch.sigmoid, {}),
    # Brevitas drops Hardtanh, because its own quantizers clip. A dynamic range does not clip.
    "hardtanh": (
        QuantHardTanh, lambda x: x.clamp(-0.5, 0.5), {"min_val": -0.5, "max_val": 0.5})}


@pytest.mark.parametrize(
    ("layer", "function", "settings"), ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_an_activation_layer_quantizes_its_activation(
        layer: Callable[..., nn.Module], function: Callable[[Tensor], Tensor],
        settings: dict[str, Any], x: Tensor) -> None:
    module = layer(act_quant=STOCHASTIC, return_quant_tensor=False, **settings)
    assert torch.equal(run(module, x), quantized(function(x)))


def test_quant_linear_quantizes_its_input_with_prefixed_settings() -> None:
    x = normals((5, 16)).float()
    layer = QuantLinear(
        16, 4, True, input_quant=STOCHASTIC, weight_quant=None, input_bit_width=2,
        input_bucket_size=8)
    expected = nn.functional.linear(
        quantized(x, bit_width=2, bucket_size=8), layer.weight, layer.bias)
    assert torch.equal(run(layer, x), expected)


def test_quantized_layers_pass_tensors_on(x: Tensor) -> None:
    model = nn.Sequential(
        QuantIdentity(STOCHASTIC, return_quant_tensor=True),
        QuantConv2d(8, 8, 3, input_quant=MIXED, return_quant_tensor=False),
        QuantReLU(act_quant=STOCHASTIC, return_quant_tensor=True), nn.MaxPool2d(2), nn.Flatten(),
        QuantLinear(72, 4, True))
    assert model(x).isfinite().all()


def test_quantized_addition(x: Tensor) -> None:
    layer = QuantEltwiseAdd(input_quant=STOCHASTIC, output_quant=None, return_quant_tensor=False)
    with seeded(1):
        total = layer(x, x)
    with seeded(1):
        first, second = (STOCHASTIC.tensor_quant(x)[0] for _ in range(2))
    assert torch.equal(total, first + second) and not torch.equal(first, second)


@pytest.mark.parametrize("config", [STOCHASTIC, MIXED, ShiftedUint2DynamicActPerBucketFloat])
def test_the_gradient_of_a_layer_is_almost_the_identity(config: Any, x: Tensor) -> None:
    x.requires_grad_()
    run(QuantIdentity(config, return_quant_tensor=False), x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    # Except at the two ends of the range of each of six buckets.
    assert ((x.grad - 1).abs() > 1e-5).sum() <= 2 * 6


def test_eval_stays_stochastic(x: Tensor) -> None:
    layer = QuantIdentity(STOCHASTIC, return_quant_tensor=False)
    train = run(layer, x)
    assert torch.equal(run(layer.eval(), x), train)
    assert not torch.equal(layer(x), train)


def test_a_layer_copies(x: Tensor) -> None:
    layer = QuantIdentity(MIXED, return_quant_tensor=False)
    assert torch.equal(run(copy.deepcopy(layer), x), run(layer, x))


@pytest.mark.parametrize(("config", "keys"), [
    (STOCHASTIC, []),
    (MIXED, ["act_quant.fused_activation_quant_proxy.tensor_quant."
             "msb_clamp_bit_width_impl.mix_prob"])])
def test_only_a_probability_is_in_a_checkpoint(config: Any, keys: list[str]) -> None:
    assert list(QuantIdentity(config).state_dict()) == keys


def test_a_checkpoint_restores_the_probability(x: Tensor) -> None:
    saved = QuantIdentity(MIXED, return_quant_tensor=False, mix_prob=1.0)
    layer = QuantIdentity(MIXED, return_quant_tensor=False, mix_prob=0.0)
    assert not torch.equal(run(layer, x), run(saved, x))
    layer.load_state_dict(saved.state_dict())
    assert torch.equal(run(layer, x), run(saved, x))


def test_metadata_can_be_asked_for(x: Tensor) -> None:
    layer = QuantIdentity(STOCHASTIC, return_quant_tensor=True).eval()
    layer.act_quant.cache_inference_quant_act = True
    value = layer(x)
    assert torch.equal(layer.act_quant.scale(), value.scale)
    assert torch.equal(layer.act_quant.zero_point(), value.zero_point)
    assert layer.act_quant.bit_width() == 4


def test_a_proxy_says_what_it_is() -> None:
    proxy = QuantIdentity(STOCHASTIC).act_quant
    assert proxy.rounding_mode == "STOCHASTIC_ROUND"
    assert proxy.is_signed is False and proxy.is_groupwise
    assert not proxy.requires_export_handler


def test_compiling_a_proxy_leaves_the_quantizer_accessible(x: Tensor) -> None:
    layer = QuantIdentity(STOCHASTIC, return_quant_tensor=False)
    layer.act_quant.compile_quant()
    assert torch.equal(run(layer, x), quantized(x))


# Brevitas' tools.


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())


def test_layerwise_quantize_replaces_layers(x: Tensor) -> None:
    model = layerwise_quantize(small_network(), compute_layer_map={
        nn.Conv2d: (QuantConv2d, {"input_quant": STOCHASTIC, "weight_quant": None})})
    assert [type(m) for m in model] == [QuantConv2d, nn.ReLU, QuantConv2d, nn.Flatten]
    plain = small_network()
    assert torch.equal(run(model[0], x), plain[0](quantized(x)))


def test_layerwise_quantize_wraps_layers(x: Tensor) -> None:
    model = layerwise_quantize(small_network(), compute_layer_map={
        nn.Conv2d: (QuantBackwardWrapper, {"module": lambda m: m, "act_quant": STOCHASTIC})})
    plain = small_network()
    assert [type(m) for m in model][::2] == [QuantBackwardWrapper] * 2
    assert torch.equal(model(x), plain(x))
    assert model.state_dict().keys() == plain.state_dict().keys()
    gradients = []
    for network in (model, plain):
        network(x).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    # Saved inputs are quantized, so weight gradients differ. Bias gradients do not use them.
    assert not torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_layerwise_quantize_replaces_activations(x: Tensor) -> None:
    model = layerwise_quantize(
        small_network(), compute_layer_map={
            nn.ReLU: (QuantReLU, {"act_quant": STOCHASTIC, "return_quant_tensor": False})})
    assert torch.equal(run(model[1], x), quantized(x.relu()))


def test_activations_can_be_switched_off(x: Tensor) -> None:
    model = nn.Sequential(QuantIdentity(STOCHASTIC, return_quant_tensor=False))
    with quantization_status_manager(model, disable_act_quant=True):
        assert torch.equal(model(x), x)
    assert torch.equal(run(model, x), quantized(x))


def test_calibration_passes_values_through(x: Tensor) -> None:
    model = nn.Sequential(QuantIdentity(STOCHASTIC, return_quant_tensor=False))
    with torch.no_grad(), calibration_mode(model):
        assert model(x).shape == x.shape
    assert torch.equal(run(model, x), quantized(x))


def test_a_passed_through_quant_tensor_keeps_its_metadata(x: Tensor) -> None:
    value = QuantIdentity(STOCHASTIC, return_quant_tensor=True)(x)
    passed = QuantIdentity(None, return_quant_tensor=True)(value)
    assert isinstance(passed, BucketwiseIntQuantTensor)
    assert torch.equal(passed.scale, value.scale)
