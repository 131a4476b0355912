"""Codecs of bucket quantizers: every way to compute a value gives the same value."""

from functools import cache
from typing import Any

import pytest
import torch
from brevitas.nn import QuantIdentity
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from brevitas_bp import codec_from, quant, seeded
from brevitas_bp.codec import Codec
from brevitas_bp.codec.average import AverageCodec
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.quantized import LoweredCodec, ModuleCodec
from brevitas_bp.core.bit_width import TwoBitWidthSelector
from brevitas_bp.core.int_quant import BucketRescalingIntQuant
from brevitas_bp.core.rounding import StochasticRound
from brevitas_bp.core.stats import BucketAbsMax, BucketMin, BucketMinMaxRange
from brevitas_bp.format.widths import WidthLayout
from brevitas_bp.quant import (
    ActQuantSolver,
    PerBucketMax,
    PerBucketMinMax,
    ShiftedUint2DynamicActPerBucketFloatStochastic,
    ShiftedUint2Mix4DynamicActPerBucketFloatStochastic,
    ShiftedUint4DynamicActPerBucketFloat,
    StochasticRounding,
)
from brevitas_bp.testing import check_codec
from tests.strategies import DTYPES, awkward_tensors, dtype_name, float_tensors, normals, seeds
from tests.support import same_bits

# Brevitas' own quantizers are in test_stock.py.
CONFIGS = tuple(
    name for name in quant.act.__all__ if name != "ThesisInt2DynamicActPerTensorFloat")
# Codes that need their draws again are stored by kernels alone.
GENERAL = tuple(name for name in CONFIGS if "Rotated" not in name and "Dithered" not in name)
# Metadata of float64 data keep the dtype float64.
DTYPES_AND_METADATA = [
    *((dtype, torch.float32) for dtype in DTYPES), (torch.float32, torch.bfloat16)]

each_config = pytest.mark.parametrize("name", CONFIGS)
each_dtype = pytest.mark.parametrize(
    ("dtype", "metadata_dtype"), DTYPES_AND_METADATA, ids=dtype_name)


@cache
def lowered(name: str, metadata_dtype: torch.dtype = torch.float32) -> Codec:
    codec = codec_from(getattr(quant, name), metadata_dtype=metadata_dtype)
    assert isinstance(codec, AverageCodec) is ("Avg" in name)
    assert isinstance(codec.per_element, LoweredCodec)
    return codec


@cache
def general(name: str, metadata_dtype: torch.dtype = torch.float32) -> Codec:
    codec = lowered(name, metadata_dtype)
    inner = codec.per_element
    assert isinstance(inner, LoweredCodec)
    modules = ModuleCodec(inner.quantizer)
    return AverageCodec(modules, codec.average_size) if isinstance(codec, AverageCodec) else modules


each_form = pytest.mark.parametrize(("form", "name"), [
    *((lowered, name) for name in CONFIGS), *((general, name) for name in GENERAL)])


def stored_bucket(name: str, numel: int) -> int | None:
    """Returns the bucket of a codec for a small tensor; None if it is that of the layer.

    The codec stores the padding of a rotated bucket, so it takes a smaller one. A layer stores nothing.
    """
    codec = lowered(name).per_element
    assert isinstance(codec, LoweredCodec)
    size = codec.spec.for_numel(numel).bucket_size
    return None if size == codec.spec.bucket_size else size


def forward_value(quantizer: nn.Module, x: Tensor, seed: int) -> Tensor:
    """Returns the value of a forward layer; an expanded tensor is quantized in its stored shape."""
    with torch.no_grad(), seeded(seed):
        return quantizer(TensorLayout.base(x)).expand(x.shape)


@each_config
@each_dtype
def test_decoding_gives_the_value_of_quant_identity(
        name: str, dtype: torch.dtype, metadata_dtype: torch.dtype) -> None:
    config = getattr(quant, name)
    layer = QuantIdentity(config, return_quant_tensor=False, metadata_dtype=metadata_dtype)
    for case, x in awkward_tensors(dtype).items():
        decoded = lowered(name, metadata_dtype).encode(x, seed=77).decode()
        small = stored_bucket(name, TensorLayout.of(x).numel)
        same = layer if small is None else QuantIdentity(
            config, return_quant_tensor=False, metadata_dtype=metadata_dtype, bucket_size=small)
        assert same_bits(decoded, forward_value(same, x, 77)), case


@pytest.mark.parametrize("name", GENERAL)
@each_dtype
def test_the_general_path_gives_the_same_bytes(
        name: str, dtype: torch.dtype, metadata_dtype: torch.dtype) -> None:
    for case, x in awkward_tensors(dtype).items():
        if x.numel():
            packed = [
                form(name, metadata_dtype).encode(x, seed=5) for form in (lowered, general)]
            assert len(packed[0].tensors) == len(packed[1].tensors)
            assert all(map(same_bits, packed[0].tensors, packed[1].tensors)), case
            assert same_bits(packed[0].decode(), packed[1].decode()), case


@given(float_tensors(), st.sampled_from(CONFIGS), seeds)
def test_shape_strides_dtype_and_device_come_back(x: Tensor, name: str, seed: int) -> None:
    expected = TensorLayout.of(x)
    for form in (lowered, general) if name in GENERAL else (lowered,):
        decoded = form(name).encode(x, seed=seed).decode()
        assert (decoded.shape, decoded.stride()) == (x.shape, expected.stride)
        assert (decoded.dtype, decoded.device) == (x.dtype, x.device)


@each_form
def test_an_empty_tensor_comes_back(name: str, form: Any) -> None:
    packed = form(name).encode(torch.empty(0, 3), seed=0)
    assert packed.nbytes == 0 and packed.decode().shape == (0, 3)


@each_form
def test_the_global_generator_is_untouched(name: str, form: Any) -> None:
    before = torch.get_rng_state()
    form(name).encode(normals((1000,)).float(), seed=1).decode()
    assert torch.equal(torch.get_rng_state(), before)


@each_config
def test_the_least_number_of_bytes_is_stated_in_advance(name: str) -> None:
    for numel in (1, 255, 256, 1000):
        packed = lowered(name).encode(normals((numel,)).float(), seed=1)
        least = lowered(name).stored_nbytes(packed.layout)
        assert least is not None
        assert least == packed.nbytes if "Mix" not in name else least <= packed.nbytes


#: What a config promises less than the defaults of check_codec.
LESS: dict[str, dict[str, Any]] = {
    # Their scale is the norm of a bucket, so a step is larger than most values.
    **{name: {"largest_error": 20.0, "without": ["order"]} for name in CONFIGS if "L2" in name},
    # A rotated bucket has a range of several times its largest value.
    "RotatedUint1DynamicActPerBucketFloatDithered": {"largest_error": 8.0}}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_invariant_of_a_codec_holds(name: str) -> None:
    draws = name.endswith(("Stochastic", "Dithered")) or "Rotated" in name or "Mix" in name
    assert len(check_codec(lowered(name), stochastic=draws, **LESS.get(name, {}))) > 22


@pytest.mark.parametrize("name", GENERAL[::6])
def test_they_hold_through_modules(name: str) -> None:
    settings = LESS.get(name, {})
    network = ["wrapper"]  # Twice as slow; tests/testing/test_check_codec.py tries one.
    check_codec(general(name), **{**settings, "without": [*settings.get("without", []), *network]})


# Custom components of a user.


class Percentile(nn.Module):
    """A range that excludes the largest values."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().quantile(0.9, dim=-1, keepdim=True)


class Forgetful(nn.Module):
    """A range that hides NaN and Inf."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True)


class FirstElement(nn.Module):
    """An offset that is not rounded to the metadata's dtype."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1]


class AlternateWidths(TwoBitWidthSelector):
    """Mixes other buckets than the library would."""

    def __init__(self, bit_width: int, mix_bit_width: int, mix_prob: float) -> None:
        super().__init__(bit_width, mix_bit_width, mix_prob)

    def draw(self, n: int) -> WidthLayout:
        return WidthLayout(n, n // 2, shift=1)


class PercentileConfig(StochasticRounding, PerBucketMax, ActQuantSolver):
    bit_width = 4
    bucket_size = 64
    scaling_stats_impl = Percentile


class ForgetfulConfig(PerBucketMax, ActQuantSolver):
    bit_width = 4
    bucket_size = 64
    scaling_stats_impl = Forgetful


class FirstElementConfig(StochasticRounding, PerBucketMinMax, ActQuantSolver):
    bit_width = 4
    bucket_size = 64
    zero_point_stats_impl = FirstElement
    metadata_dtype = torch.bfloat16


class AlternateWidthsConfig(ShiftedUint2Mix4DynamicActPerBucketFloatStochastic):
    bucket_size = 64
    bit_width_impl = AlternateWidths


class PowerOfTwoConfig(ShiftedUint4DynamicActPerBucketFloat):
    bucket_size = 64
    restrict_scaling_type = "power_of_two"


OWN = (
    PercentileConfig, ForgetfulConfig, FirstElementConfig, AlternateWidthsConfig, PowerOfTwoConfig)


def takes_the_general_path(codec: Codec) -> bool:
    return type(codec) is ModuleCodec


@pytest.mark.parametrize("config", OWN)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_part_of_the_users_own_is_run(config: Any, dtype: torch.dtype) -> None:
    codec = codec_from(config)
    layer = QuantIdentity(config, return_quant_tensor=False)
    assert takes_the_general_path(codec)
    x = normals((1000,)).to(dtype)
    assert same_bits(codec.encode(x, seed=3).decode(), forward_value(layer, x, 3))


def test_a_statistic_that_hides_nan_does_not_hide_it_from_backward() -> None:
    x = normals((256,)).float()
    x[100] = float("nan")
    decoded = codec_from(ForgetfulConfig).encode(x, seed=0).decode()
    assert decoded.isnan().view(4, 64).all(-1).tolist() == [False, True, False, False]
    assert not decoded[:64].isnan().any()


def test_power_of_two_scales_do_not_overflow_the_codes() -> None:
    # Brevitas' solver pairs such scales with a top code of 2**bits, which no code can hold.
    packed = codec_from(PowerOfTwoConfig).encode(normals((256,)).float(), seed=0)
    scales, _ = packed.tensors[1].view(2, -1)
    assert torch.equal(scales, scales.log2().round().exp2())
    layer = QuantIdentity(PowerOfTwoConfig, return_quant_tensor=True)
    assert layer(normals((256,)).float()).int().max() <= 15


class OwnRound(StochasticRound):
    pass


class OwnMin(BucketMin):
    pass


class OwnRange(BucketMinMaxRange):
    pass


class OwnAbsMax(BucketAbsMax):
    pass


class OwnSelector(TwoBitWidthSelector):
    pass


class OwnTensorQuant(BucketRescalingIntQuant):
    pass


SUBCLASSED: list[tuple[Any, dict[str, Any]]] = [
    (ShiftedUint2DynamicActPerBucketFloatStochastic, {"float_to_int_impl": OwnRound}),
    (ShiftedUint2DynamicActPerBucketFloatStochastic, {"zero_point_stats_impl": OwnMin}),
    (ShiftedUint2DynamicActPerBucketFloatStochastic, {"scaling_stats_impl": OwnRange}),
    (ShiftedUint2DynamicActPerBucketFloatStochastic, {"tensor_quant": OwnTensorQuant}),
    (quant.Int4DynamicActPerBucketFloatStochastic, {"scaling_stats_impl": OwnAbsMax}),
    (ShiftedUint2Mix4DynamicActPerBucketFloatStochastic, {"bit_width_impl": OwnSelector})]


@pytest.mark.parametrize(("config", "part"), SUBCLASSED)
def test_a_subclass_is_not_taken_for_its_base(config: Any, part: dict[str, Any]) -> None:
    codec = codec_from(config, **part)
    assert takes_the_general_path(codec)
    # These subclasses compute what their bases compute, so the bytes show that nothing was lost.
    x = normals((1000,)).float()
    plain, own = (c.encode(x, seed=1).tensors for c in (codec_from(config), codec))
    assert all(map(same_bits, plain, own))


def test_rounding_that_depends_on_eval_takes_the_general_path() -> None:
    codec = codec_from(ShiftedUint2DynamicActPerBucketFloatStochastic, deterministic_inference=True)
    assert takes_the_general_path(codec)


def test_widths_that_are_learned_are_refused() -> None:
    with pytest.raises(TypeError, match="a learned bit width would have to be read"):
        codec_from(ShiftedUint4DynamicActPerBucketFloat, bit_width_impl_type="parameter")
