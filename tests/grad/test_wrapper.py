"""Arguments, errors and the place of ``QuantGradientWrapper`` in a model."""

import copy
from typing import Any

import pytest
import torch
from brevitas.quant import (
    Int8ActPerTensorFloat,
    Int8WeightPerTensorFloat,
    SignedBinaryActPerTensorConst,
    Uint8ActPerTensorFloat,
    Uint8ActPerTensorFloatMaxInit,
)
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import (
    QuantBackwardWrapper,
    SecondDerivativeError,
    UnknownNameError,
    UnsupportedQuantizerError,
    codec_from,
)
from brevitas_bp.backward import NoiseState
from brevitas_bp.grad import QuantGradientWrapper
from brevitas_bp.grad.layers import rounding_of
from brevitas_bp.quant import (
    ActQuantSolver,
    PerBucketMinMax,
    RotatedNormal4DynamicActPerBucketFloat,
    ShiftedUint4DynamicGradPerRowFloatStochastic,
    StochasticRounding,
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16),
        nn.Linear(16, 4))


X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def loss(model: nn.Module) -> Tensor:
    return model(X).logsumexp(1).mean()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def gradient(model: nn.Module) -> Tensor:
    model.zero_grad()
    loss(model).backward()
    return weights(model)


def test_forward_and_random_state_keep_their_bits() -> None:
    plain, module = net(), net()
    model = QuantGradientWrapper(module)
    torch.manual_seed(3)
    expected = F.dropout(plain(X))
    state = torch.get_rng_state()
    torch.manual_seed(3)
    output = F.dropout(model(X))
    assert torch.equal(output, expected)
    output.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(module.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())


def test_one_seed_gives_one_gradient_and_the_stream_goes_on() -> None:
    a, b = (QuantGradientWrapper(net(), input_grad_bit_width=4, seed=7) for _ in range(2))
    first = gradient(a)
    assert torch.equal(first, gradient(b))
    assert not torch.equal(gradient(a), first)
    assert not torch.equal(gradient(QuantGradientWrapper(net(), input_grad_bit_width=4, seed=8)), first)


def test_noise_continues_from_its_state() -> None:
    model = QuantGradientWrapper(net(), input_grad_bit_width=4, seed=7)
    gradient(model)
    state, expected = model.noise_state(), gradient(model)
    model.set_noise_state(state)
    assert torch.equal(gradient(model), expected)


def test_noise_of_all_wrappers_is_one_state() -> None:
    model = QuantBackwardWrapper(QuantGradientWrapper(net(), seed=1), seed=2)
    state = NoiseState(model)
    saved = state.state_dict()
    assert sorted(saved) == ["", "module"]
    expected = gradient(model)
    state.load_state_dict(saved)
    assert torch.equal(gradient(model), expected)


def test_overrides_choose_by_name() -> None:
    model = QuantGradientWrapper(
        net(), ShiftedUint4DynamicGradPerRowFloatStochastic, overrides={
            "0": None, "4": 6, "5": (None, RotatedNormal4DynamicActPerBucketFloat)})
    found = {
        name: rounding_of(layer) for name, layer in model.module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))}
    assert found["0"] is None
    middle, last = found["4"], found["5"]
    assert middle is not None and middle.for_input is not None and middle.for_weight is not None
    assert middle.for_input.name == "ShiftedUint4DynamicGradPerRowFloatStochastic, 6 bits"
    assert last is not None and last.for_input is None and last.for_weight is not None
    assert model.rounded_layers() == ["4", "5"]
    lines = model.explain().splitlines()
    assert lines[2].split() == ["0", "Conv2d", "exact", "exact"]
    assert "RotatedNormal4" in lines[4]
    plain = gradient(net())
    assert not torch.equal(gradient(model), plain)


@pytest.mark.parametrize("quantizer", [
    RotatedNormal4DynamicActPerBucketFloat, codec_from(RotatedNormal4DynamicActPerBucketFloat)],
    ids=["config", "codec"])
def test_any_activation_quantizer_rounds_gradients(quantizer: Any) -> None:
    model = QuantGradientWrapper(net(), quantizer, quantizer)
    exact = gradient(net())
    error = (gradient(model) - exact).norm() / exact.norm()
    assert 0 < float(error) < 0.5


@pytest.mark.parametrize(("quantizer", "message"), [
    (Int8ActPerTensorFloat, "keeps statistics of earlier calls"),
    (Uint8ActPerTensorFloat, "keeps statistics of earlier calls"),
    (Uint8ActPerTensorFloatMaxInit, "more settings"),
    (SignedBinaryActPerTensorConst, "infinite gradient|statistics")])
def test_unsuited_quantizers_are_refused(quantizer: Any, message: str) -> None:
    with pytest.raises(UnsupportedQuantizerError, match=message):
        QuantGradientWrapper(net(), quantizer)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"input_grad_bit_widht": 4}, UnknownNameError, "no setting 'bit_widht'; did you mean 'bit_width'"),
    ({"bit_width": 4}, UnknownNameError, "there is no argument 'bit_width'"),
    ({"overides": {}}, UnknownNameError, "did you mean 'overrides'"),
    ({"overrides": {"9": None}}, UnknownNameError, "matches no layer"),
    ({"overrides": {"1": None}}, UnknownNameError, "matches no layer"),
    ({"overrides": [None]}, TypeError, "overrides must map globs"),
    ({"overrides": {"0": (None, None, None)}}, TypeError, "a pair"),
    ({"overrides": {"0": "exact"}}, TypeError, "must be a Brevitas config class"),
    ({"input_grad_quant": None, "input_grad_bit_width": 4}, TypeError, "would do nothing"),
    ({"input_grad_quant": Int8WeightPerTensorFloat}, UnsupportedQuantizerError, "weights or biases"),
    ({"weight_grad_bit_width": 9}, ValueError, "bit_width must be"),
    ({"seed": "a"}, TypeError, "seed must be an integer"),
    ({"rank": 1.5}, TypeError, "rank must be an integer"),
])
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type, message: str) -> None:
    module = net()
    with pytest.raises(error, match=message.replace("(", r"\(")):
        QuantGradientWrapper(module, **arguments)
    assert all(rounding_of(m) is None for m in module.modules())


def test_codecs_and_modules_have_no_settings() -> None:
    codec = codec_from(RotatedNormal4DynamicActPerBucketFloat)
    with pytest.raises(TypeError, match="is built already"):
        QuantGradientWrapper(net(), codec, input_grad_bit_width=4)
    with pytest.raises(TypeError, match="built already; pass its config class"):
        QuantGradientWrapper(net(), codec, overrides={"0": 4})


def test_modules_without_layers_and_twice_wrapped_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="no linear layer or convolution"):
        QuantGradientWrapper(nn.Sequential(nn.ReLU()))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        QuantGradientWrapper(nn.Linear)  # pyright: ignore[reportArgumentType]
    model = QuantGradientWrapper(net())
    with pytest.raises(ValueError, match="already rounds its gradients"):
        QuantGradientWrapper(model)
    QuantGradientWrapper(model.unwrap())


def test_a_lazy_layer_has_no_shape_yet() -> None:
    module = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match="is lazy"):
        QuantGradientWrapper(module)


class Silent(nn.Linear):
    """A layer that multiplies in a way that nothing sees."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.t()


def test_a_layer_whose_product_is_not_seen_is_named_once() -> None:
    model = QuantGradientWrapper(nn.Sequential(nn.Linear(4, 4), Silent(4, 4)))
    with pytest.warns(UserWarning, match="while layer '1' ran, so its gradient is exact"):
        model(torch.randn(3, 4))
    model(torch.randn(3, 4))


def test_attention_keeps_its_projections_exact() -> None:
    model = QuantGradientWrapper(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    assert model.rounded_layers() == ["linear1", "linear2"]
    model(torch.randn(2, 3, 8)).sum().backward()


def test_a_nan_reaches_the_loss_scaler() -> None:
    model = QuantGradientWrapper(net())
    output = model(X)
    cotangent = torch.ones_like(output)
    cotangent[2, 1] = torch.nan
    output.backward(cotangent)
    assert model.module[0].weight.grad.isnan().any()


def test_own_quantizers_compose() -> None:
    class Mine(StochasticRounding, PerBucketMinMax, ActQuantSolver):
        bit_width = 3
        bucket_size = 64

    assert gradient(QuantGradientWrapper(net(), Mine, Mine)).isfinite().all()


def test_a_second_derivative_is_refused() -> None:
    """The product's node does not depend on the layer's input, so a term would be missing."""
    model = QuantGradientWrapper(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)))
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(SecondDerivativeError, match="overrides"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(SecondDerivativeError, match="within torch"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: model(x).sum())(x).sum())(x.detach())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_passes_through_without_rounding() -> None:
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    x, tangent = torch.randn(3, 4), torch.randn(3, 4)
    expected = torch.func.jvp(plain, (x,), (tangent,))
    found = torch.func.jvp(QuantGradientWrapper(plain), (x,), (tangent,))
    torch.testing.assert_close(found, expected)


class Outer(nn.Linear):
    """A linear layer with another one inside."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.inner = nn.Linear(4, 4)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.inner(input)


def test_a_layer_inside_a_layer_has_its_own_rounding_only() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4, requires_grad=True)
    exact = Outer()
    model = QuantGradientWrapper(
        copy.deepcopy(exact), None, weight_grad_bit_width=2, overrides={"inner": None})
    assert model.rounded_layers() == [""]
    for net in (exact, model):
        net(x).square().sum().backward()
    assert torch.equal(model.module.inner.weight.grad, exact.inner.weight.grad)
    assert not torch.allclose(model.module.weight.grad, exact.weight.grad)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex_layers_and_layers_with_a_forward_of_their_own_are_refused() -> None:
    model = QuantGradientWrapper(nn.Linear(4, 4).to(torch.complex64))
    with pytest.raises(UnsupportedQuantizerError, match="complex numbers"):
        model(torch.randn(3, 4, dtype=torch.complex64))
    layer = nn.Linear(4, 4)
    layer.forward = layer.forward
    with pytest.raises(ValueError, match="has a forward of its own"):
        QuantGradientWrapper(layer)


def test_a_class_that_was_changed_later_is_named() -> None:
    model = QuantGradientWrapper(nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(model.module)
    copy.deepcopy(model)(torch.randn(3, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="was changed after the layer was wrapped"):
        model.unwrap()
    nn.utils.parametrize.remove_parametrizations(model.module, "weight")
    assert type(model.unwrap()) is nn.Linear


def test_one_seed_gives_other_noise_than_for_saved_tensors() -> None:
    """Otherwise the gradient of a weight would be a product of two equal roundings."""
    gradients, saved = QuantGradientWrapper(net(), seed=1), QuantBackwardWrapper(net(), seed=1)
    assert gradients.noise_state()["base"] != saved.noise_state()["base"]


def test_each_backward_pass_draws_noise_of_its_own() -> None:
    model = QuantGradientWrapper(net(), input_grad_bit_width=2, weight_grad_bit_width=2, seed=1)
    value = loss(model)
    grads = [
        torch.autograd.grad(value, model.module[4].weight, retain_graph=True)[0] for _ in range(2)]
    assert not torch.equal(*grads)


def test_inner_wrappers_may_be_left_out() -> None:
    module = net()
    inner = QuantGradientWrapper(module[4])
    outer = QuantGradientWrapper(module, overrides={"4": None})
    assert rounding_of(module[4]) is not None and outer.rounded_layers() == ["0", "4", "5"]
    inner.unwrap()
    assert outer.rounded_layers() == ["0", "5"]
