"""Misspelt settings are refused wherever they can be given; Brevitas would ignore them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from brevitas.nn import (
    QuantHardTanh,
    QuantIdentity,
    QuantLinear,
    QuantMultiheadAttention,
    QuantReLU,
)
from brevitas.quant import Int8ActPerTensorFloat, Int8ActPerTensorFloatMSE
from torch import nn

from brevitas_bp import UnknownNameError, codec_from
from brevitas_bp.quant import (
    ShiftedUint2DynamicActPerBucketFloat as Nearest,
)
from brevitas_bp.quant import (
    ShiftedUint2DynamicActPerBucketFloatStochastic as Stochastic,
)
from brevitas_bp.quant import (
    ShiftedUint2Mix4DynamicActPerBucketFloatStochastic as Mixed,
)

MISSPELT: dict[str, Callable[[], Any]] = {
    "codec_from": lambda: codec_from(Nearest, bucket_sise=64),
    "let": lambda: QuantIdentity(Nearest.let(bucket_sise=64)),
    "let, then codec_from": lambda: codec_from(Nearest.let(bucket_sise=64)),
    "two lets": lambda: QuantIdentity(Nearest.let(bucket_sise=64).let(bit_width=4)),
    "QuantIdentity": lambda: QuantIdentity(Nearest, bucket_sise=64),
    "QuantReLU": lambda: QuantReLU(act_quant=Nearest, bucket_sise=64),
    "QuantLinear": lambda: QuantLinear(4, 4, True, input_quant=Nearest, input_bucket_sise=64),
    "QuantLinear's output": lambda: QuantLinear(
        4, 4, True, output_quant=Nearest, output_bucket_sise=64),
    "a valid keyword beside it": lambda: QuantIdentity(Nearest, bit_width=4, bucket_sise=64)}


@pytest.mark.parametrize("build", MISSPELT.values(), ids=MISSPELT.keys())
def test_a_misspelt_setting_is_refused_with_the_nearest_name(build: Callable[[], Any]) -> None:
    message = r"has no setting 'bucket_sise'; did you mean 'bucket_size'\?"
    with pytest.raises(UnknownNameError, match=message):
        build()


def test_the_message_names_the_config_that_a_person_wrote() -> None:
    with pytest.raises(UnknownNameError, match="ShiftedUint2DynamicActPerBucketFloat has no"):
        QuantIdentity(Nearest.let(bit_width=4), bucket_sise=64)


def test_brevitas_ignores_what_we_refuse() -> None:
    # Positive control.
    QuantIdentity(Int8ActPerTensorFloat, bit_widht=4)


@pytest.mark.parametrize("config", [Int8ActPerTensorFloat, Int8ActPerTensorFloatMSE])
def test_a_stock_config_in_codec_from_is_checked_too(config: Any) -> None:
    with pytest.raises(UnknownNameError, match=r"'bit_widht'; did you mean 'bit_width'\?"):
        codec_from(config, bit_widht=4)


def test_a_setting_of_a_part_that_is_absent_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="has no setting 'mix_prob'"):
        codec_from(Stochastic, mix_prob=0.3)
    with pytest.raises(UnknownNameError, match="has no setting 'deterministic_inference'"):
        codec_from(Nearest, deterministic_inference=True)


KNOWN: list[tuple[Any, dict[str, Any]]] = [
    (Nearest, {"bit_width": 4, "bucket_size": 64, "metadata_dtype": torch.bfloat16}),
    (Nearest, {"quantize_zero_point": True, "float_to_int_impl_type": "stochastic_round"}),
    # These are not in the config: they are optional arguments of its components.
    (Stochastic, {"deterministic_inference": True}),
    (Mixed, {"mix_bit_width": 8, "mix_prob": 0.1, "mix_per": "tensor"}),
    (Int8ActPerTensorFloat, {"collect_stats_steps": 5, "high_percentile_q": 90.0}),
    (Int8ActPerTensorFloatMSE, {"bit_width": 4, "collect_stats_steps": 5})]


@pytest.mark.parametrize(("config", "settings"), KNOWN)
def test_every_setting_that_is_read_is_accepted(config: Any, settings: dict[str, Any]) -> None:
    codec_from(config, **settings)
    QuantIdentity(config, **settings)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "prefix": lambda: QuantLinear(
        4, 4, True, input_quant=Nearest, input_bit_width=4, weight_bit_width=5),
    "activation's own settings": lambda: QuantHardTanh(
        act_quant=Nearest, min_val=-0.5, max_val=0.5),
    "attention": lambda: QuantMultiheadAttention(
        4, 1, in_proj_input_quant=Nearest, in_proj_input_bit_width=4, packed_in_proj=False)}


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS.keys())
def test_what_brevitas_layers_pass_on_is_accepted(build: Callable[[], nn.Module]) -> None:
    assert isinstance(build(), nn.Module)
