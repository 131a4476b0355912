"""Arguments that codec_from accepts, and the reasons with which it refuses others."""

from collections.abc import Callable
from typing import Any

import brevitas.quant
import pytest
import torch
from brevitas.nn import QuantIdentity, QuantReLU
from torch import nn

from brevitas_bp import UnsupportedQuantizerError, codec_from, quant
from brevitas_bp.codec import Codec
from brevitas_bp.codec.quantized import LoweredCodec, ModuleCodec
from tests.strategies import normals
from tests.support import same_bits

CONFIG = quant.ShiftedUint2DynamicActPerBucketFloat

SOURCES: dict[str, Callable[[], Any]] = {
    "config": lambda: CONFIG,
    "config with let": lambda: CONFIG.let(),
    "proxy": lambda: QuantIdentity(CONFIG).act_quant,
    "tensor_quant": lambda: CONFIG.tensor_quant}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_sources_of_a_quantizer_are_equivalent(source: Callable[[], Any]) -> None:
    x = normals((1000,)).float()
    expected = codec_from(CONFIG).encode(x, seed=0)
    got = codec_from(source()).encode(x, seed=0)
    assert all(map(same_bits, got.tensors, expected.tensors))


def test_a_proxy_is_shared_and_a_config_built_anew() -> None:
    proxy = QuantIdentity(CONFIG).act_quant
    first, second = codec_from(proxy), codec_from(CONFIG)
    assert isinstance(first, LoweredCodec) and isinstance(second, LoweredCodec)
    assert first.quantizer is proxy.fused_activation_quant_proxy.tensor_quant
    assert second.quantizer is not first.quantizer


GRAPHLESS: dict[str, Callable[[], Codec]] = {
    "lowered": lambda: codec_from(CONFIG),
    "lowered, whole tensors": lambda: codec_from(CONFIG, bucket_size=None),
    "general": lambda: ModuleCodec(CONFIG.tensor_quant),
    "stock integers": lambda: codec_from(brevitas.quant.Int8ActPerTensorFloat),
    "stock minifloats": lambda: codec_from(brevitas.quant.Fp8e4m3Act)}


@pytest.mark.parametrize("build", GRAPHLESS.values(), ids=GRAPHLESS.keys())
def test_a_payload_holds_no_graph(build: Callable[[], Codec]) -> None:
    packed = build().encode(normals((1000,)).float().requires_grad_(), seed=0)
    assert not any(t.requires_grad for t in packed.tensors)
    assert not packed.decode().requires_grad


@pytest.mark.parametrize(("config", "name"), [
    ("ShiftedUint2DynamicActPerBucketFloat", "2-bit nearest"),
    ("Int4DynamicActPerTensorFloatStochastic", "4-bit stochastic"),
    ("ShiftedUint3Mix6DynamicActPerBucketFloatStochastic", "3/6-bit stochastic"),
    ("ThesisInt2DynamicActPerTensorFloat", "2-bit stock")])
def test_a_codec_has_a_short_name(config: str, name: str) -> None:
    assert codec_from(getattr(quant, config)).name == name


UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "binary": (
        lambda: codec_from(brevitas.quant.SignedBinaryActPerTensorConst),
        "binary quantizers give signs and no integer codes"),
    "batch quantizer": (
        lambda: codec_from(brevitas.quant.Int8ActPerTensorFloatBatchQuant2d),
        "batch quantizers take their scale from the channels"),
    "batch quantizer of 3-D": (
        lambda: codec_from(brevitas.quant.Uint8ActPerTensorFloatBatchQuant1d),
        "batch quantizers take their scale from the channels"),
    "wide codes": (
        lambda: codec_from(brevitas.quant.Int8ActPerTensorFloat, bit_width=16),
        r"codes of 1\.\.8 bits can be stored, the quantizer has 16"),
    "stock proxy with an activation": (
        lambda: codec_from(QuantReLU().act_quant), "the proxy applies ReLU before it quantizes"),
    "our proxy with an activation": (
        lambda: codec_from(QuantReLU(act_quant=CONFIG).act_quant),
        "the proxy applies ReLU before it quantizes"),
    "proxy without a quantizer": (
        lambda: codec_from(QuantIdentity(None).act_quant),
        "quantizes nothing; pass act_quant=None"),
    "config without a quantizer": (
        lambda: codec_from(brevitas.quant.NoneActQuant), "quantizes nothing"),
    "weights": (
        lambda: codec_from(brevitas.quant.Int8WeightPerTensorFloat),
        "Int8WeightPerTensorFloat quantizes weights or biases"),
    "biases": (
        lambda: codec_from(brevitas.quant.Int8Bias), "Int8Bias quantizes weights or biases"),
    "a layer": (lambda: codec_from(nn.Linear(2, 2)), "cannot store what Linear quantizes"),
    "learned widths": (
        lambda: codec_from(CONFIG, bit_width_impl_type="parameter"), "a learned bit width")}


@pytest.mark.parametrize(
    ("build", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_cannot_be_packed_is_refused_with_a_reason(
        build: Callable[[], Any], reason: str) -> None:
    with pytest.raises(UnsupportedQuantizerError, match=reason):
        build()


@pytest.mark.parametrize("config", ["MXInt8Act", "MXFloat8e4m3Act"])
def test_a_missing_group_dimension_is_asked_for(config: str) -> None:
    with pytest.raises(ValueError, match=f"{config} needs group_dim"):
        codec_from(getattr(brevitas.quant, config))


@pytest.mark.parametrize("quantizer", [None, "Int8", 8, QuantIdentity, torch.zeros(3)])
def test_something_else_is_refused(quantizer: Any) -> None:
    with pytest.raises(TypeError, match=r"codec_from: expected a Brevitas config class"):
        codec_from(quantizer)


def test_settings_of_a_quantizer_that_is_built_are_refused() -> None:
    with pytest.raises(TypeError, match=r"keyword overrides \['bit_width'\] need a config class"):
        codec_from(QuantIdentity(CONFIG).act_quant, bit_width=3)


MIXED = quant.ShiftedUint2Mix4DynamicActPerBucketFloatStochastic
BAD_SETTINGS: list[tuple[Any, dict[str, Any], str]] = [
    *((CONFIG, {"bit_width": width}, "bit_width must be an integer in 1..8")
      for width in (0, 9, -1, 2.5, 2.0, "2", None, True, float("nan"), float("inf"))),
    *((CONFIG, {"bucket_size": size}, "bucket_size must be a positive multiple of 8")
      for size in (12, 0, -8, 8.0, "8", True)),
    *((CONFIG, {"metadata_dtype": dtype}, "metadata_dtype must be torch.float32 or torch.bfloat16")
      for dtype in (torch.int32, torch.float16, "float32")),
    *((MIXED, {"mix_prob": p}, r"mix_prob must be a number in \[0, 1\]")
      for p in (-0.1, 1.1, float("nan"), "half", None)),
    (MIXED, {"mix_bit_width": 9}, "bit_width must be an integer in 1..8"),
    (MIXED, {"mix_bit_width": 2}, "mix_bit_width must differ from bit_width"),
    (MIXED, {"mix_per": "row"}, "mix_per must be 'bucket' or 'tensor'"),
    (quant.Int2DynamicActPerBucketFloat, {"bit_width": 1}, "1 bits leave no level on both sides"),
    (quant.Int4DynamicActPerBucketFloat, {"narrow_range": False}, "need narrow_range=True")]


@pytest.mark.parametrize(("config", "settings", "message"), BAD_SETTINGS)
@pytest.mark.parametrize("use", [codec_from, QuantIdentity], ids=["codec", "layer"])
def test_a_bad_setting_is_refused_before_any_work(
        use: Callable[..., Any], config: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use(config, **settings)
