"""Fragments: the configs that they compose to, and the order of bases."""

from typing import Any

import pytest
import torch
from brevitas.core.function_wrapper import RoundSte
from brevitas.core.function_wrapper.stochastic_round import StochasticRoundSte
from brevitas.inject.enum import QuantType
from brevitas.nn import QuantIdentity
from brevitas.quant import Fp8e4m3ActPerTensorFloat, Int8ActPerTensorFloat, MXInt8Act
from torch import Tensor

from brevitas_bp import codec_from, quant
from brevitas_bp.codec.quantized import LoweredCodec
from brevitas_bp.core.rounding import StochasticRound
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import L2, MAX, NARROW, NEAREST, SIGN_MAGNITUDE
from brevitas_bp.proxy import BucketwiseActQuantProxyFromInjector
from brevitas_bp.quant import (
    ActQuantSolver,
    GroupAverage,
    PerBucketL2,
    PerBucketMax,
    PerBucketMinMax,
    PerTensorL2,
    PerTensorMax,
    PerTensorMinMax,
    SignMagnitude,
    StochasticRounding,
    TwoBitWidth,
)
from tests.stats import hoeffding
from tests.strategies import normals


class Mine(StochasticRounding, PerBucketMinMax, ActQuantSolver):
    bit_width = 2
    bucket_size = 512


def test_a_config_of_three_lines_works() -> None:
    codec = codec_from(Mine)
    assert isinstance(codec, LoweredCodec)
    assert codec.spec == BucketQuantSpec(2, 512)
    x = normals((1000,)).float()
    assert QuantIdentity(Mine, return_quant_tensor=False)(x).shape == x.shape
    assert codec.encode(x, seed=0).nbytes == 2 * (128 + 4 + 4)


FRAGMENTS: list[tuple[Any, dict[str, Any]]] = [
    (PerBucketMinMax, {}),
    (PerTensorMinMax, {"bucket_size": None}),
    (PerBucketMax, {"scale_rule": MAX, "code_range": NARROW}),
    (PerTensorMax, {"scale_rule": MAX, "code_range": NARROW, "bucket_size": None}),
    (PerBucketL2, {"scale_rule": L2, "code_range": NARROW}),
    (PerTensorL2, {"scale_rule": L2, "code_range": NARROW, "bucket_size": None}),
    (SignMagnitude, {"scale_rule": MAX, "code_range": SIGN_MAGNITUDE})]


@pytest.mark.parametrize(("fragment", "facts"), FRAGMENTS)
def test_a_scaling_fragment_decides_range_and_bucket(
        fragment: Any, facts: dict[str, Any]) -> None:
    class Config(fragment, ActQuantSolver):  # type: ignore[misc, valid-type]
        pass

    codec = codec_from(Config)
    assert isinstance(codec, LoweredCodec)
    assert codec.spec == BucketQuantSpec(**{"bit_width": 8, "rounding": NEAREST} | facts)


def test_two_widths_are_a_fragment() -> None:
    class Config(TwoBitWidth, StochasticRounding, PerBucketMax, ActQuantSolver):
        bit_width = 2
        mix_bit_width = 8
        mix_prob = 0.25
        mix_per = "tensor"

    codec = codec_from(Config)
    assert isinstance(codec, LoweredCodec)
    assert codec.spec == BucketQuantSpec(
        2, 256, MAX, NARROW, mix_bit_width=8, mix_prob=0.25, mix_per="tensor")


# Brevitas merges bases from right to left.


def rounding_of(config: Any) -> type:
    return type(config.tensor_quant.int_quant.float_to_int_impl)


def test_the_left_fragment_wins() -> None:
    class Config(StochasticRounding, PerBucketMinMax, ActQuantSolver):
        pass

    class Reversed(PerBucketMinMax, StochasticRounding, ActQuantSolver):
        pass

    assert rounding_of(Config) is StochasticRound
    assert rounding_of(Reversed) is RoundSte


def test_an_own_attribute_wins_over_every_fragment() -> None:
    class Config(StochasticRounding, PerBucketMinMax, ActQuantSolver):
        float_to_int_impl = RoundSte

    assert rounding_of(Config) is RoundSte


def test_a_fragment_right_of_a_complete_config_is_ignored() -> None:
    class Config(quant.ShiftedUint2DynamicActPerBucketFloat, StochasticRounding):
        pass

    assert rounding_of(Config) is RoundSte


def test_a_solver_on_the_left_hides_the_fragments() -> None:
    # Brevitas' own choice of a proxy wins, and then no check of a bucket quantizer runs.
    class Config(ActQuantSolver, PerBucketMinMax):
        pass

    assert Config.proxy_class is not BucketwiseActQuantProxyFromInjector


@pytest.mark.parametrize("fragment", [
    GroupAverage, StochasticRounding, TwoBitWidth, PerBucketMinMax, PerBucketMax, PerBucketL2,
    SignMagnitude])
def test_no_fragment_inherits_the_solver(fragment: Any) -> None:
    # A solver in a fragment would override the bases to its right.
    assert not issubclass(fragment, ActQuantSolver)


# Rounding of Brevitas' own quantizers.


class StochasticInt8(StochasticRounding, Int8ActPerTensorFloat):
    pass


class StockStochasticInt8(Int8ActPerTensorFloat):
    float_to_int_impl_type = "stochastic_round"


class StochasticFp8(StochasticRounding, Fp8e4m3ActPerTensorFloat):
    pass


class StochasticMXInt8(StochasticRounding, MXInt8Act):
    group_dim = 1


def mean_error_in_steps(config: Any, x: Tensor, steps: Tensor | float) -> float:
    layer = QuantIdentity(config, return_quant_tensor=False)
    torch.manual_seed(0)
    with torch.no_grad():
        return float(((layer(x) - x).double() / steps).mean())


@pytest.mark.parametrize("config", [StochasticInt8, StochasticMXInt8])
def test_a_stock_integer_quantizer_becomes_unbiased(config: Any) -> None:
    # One row, scale 2**-7 (both take 1 as the largest magnitude). All other values lie between codes.
    x = torch.full((1 << 16, 32), 10.3 / 128)
    x[:, 0] = -1.0
    tolerance = hoeffding(x.numel()) + 1e-4
    assert abs(mean_error_in_steps(config, x, 1 / 128)) < tolerance
    nearest = StochasticInt8.let(float_to_int_impl=RoundSte)
    assert abs(mean_error_in_steps(nearest, x, 1 / 128)) > tolerance


def test_a_stock_minifloat_quantizer_becomes_unbiased() -> None:
    # Near 0.3 of a largest value of 448 / 448, the values of e4m3 are 2**-5 apart.
    x = torch.full((1 << 16,), 0.31)
    x[0] = 1.0
    layer = QuantIdentity(StochasticFp8, return_quant_tensor=False)
    torch.manual_seed(0)
    with torch.no_grad():
        values = layer(x)[1:].double()
    low, high = values.unique().tolist()
    assert low < 0.31 < high
    # Scaling by 448 in float32 adds a few spacings.
    assert abs(float(values.mean()) - 0.31) < (high - low) * hoeffding(len(values)) + 1e-6


def test_torch_manual_seed_governs_a_stochastic_stock_quantizer() -> None:
    layer, x = QuantIdentity(StochasticInt8, return_quant_tensor=False), normals((100,)).float()
    layer.eval()
    torch.manual_seed(5)
    first = layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first) and not torch.equal(layer(x), first)


def errors_of_two_layers(config: Any) -> list[Tensor]:
    x = normals((1000,)).float()
    return [QuantIdentity(config, return_quant_tensor=False)(x).detach() - x for _ in range(2)]


def test_two_layers_draw_independently() -> None:
    assert not torch.equal(*errors_of_two_layers(StochasticInt8))


def test_two_stock_layers_share_their_draws() -> None:
    # Positive control: Brevitas' own stochastic rounding.
    assert rounding_of(StockStochasticInt8) is StochasticRoundSte
    assert torch.equal(*errors_of_two_layers(StockStochasticInt8))


# The solver.


def test_the_enum_for_stochastic_rounding_means_ours() -> None:
    config = quant.ShiftedUint2DynamicActPerBucketFloat
    assert rounding_of(config.let(float_to_int_impl_type="stochastic_round")) is StochasticRound


def test_quant_type_fp_switches_a_quantizer_off() -> None:
    layer = QuantIdentity(Mine, return_quant_tensor=False, quant_type=QuantType.FP)
    x = normals((100,)).float()
    assert layer(x) is x
    with pytest.raises(TypeError, match="quantizes nothing; pass act_quant=None"):
        codec_from(Mine, quant_type=QuantType.FP)


@pytest.mark.parametrize("quant_type", [QuantType.BINARY, QuantType.TERNARY])
def test_another_quant_type_is_refused(quant_type: QuantType) -> None:
    with pytest.raises(ValueError, match="a bucket quantizer has quant_type INT, or FP"):
        codec_from(Mine, quant_type=quant_type)


@pytest.mark.parametrize(("setting", "message"), [
    ({"signed": True}, "signed codes need narrow_range=True"),
    ({"metadata_dtype": torch.bfloat16, "quantize_zero_point": True}, "quantize_zero_point needs")])
def test_settings_that_contradict_each_other_are_refused(
        setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec_from(Mine, **setting)
