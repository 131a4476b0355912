"""A codec makes its variants: other widths, without averages, for one site, in a compiled graph."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from brevitas.quant import Int8ActPerTensorFloat
from torch import Tensor, nn

from brevitas_bp import OpAware, QuantBackwardWrapper, codec_from
from brevitas_bp.allocate import Candidate, plan_bit_widths
from brevitas_bp.codec import BitMask, Codec, FewBitCodec, Keep, PerSampleCodec
from brevitas_bp.codec.average import AverageCodec
from brevitas_bp.codec.base import Packed
from brevitas_bp.codec.general import ModuleCodec
from brevitas_bp.codec.graph_forms import GraphTensor
from brevitas_bp.codec.normalized import NormalizedCodec, QuotientCodec, Undo
from brevitas_bp.codec.on_backward import QuantizeOnBackward
from brevitas_bp.codec.quantized import LoweredCodec
from brevitas_bp.codec.rows import ReorderedCodec
from brevitas_bp.codec.signed import sign_exact
from brevitas_bp.codec.stock import StatefulCodec
from brevitas_bp.core.rounding import StochasticRound
from brevitas_bp.quant import (
    ActQuantSolver,
    PerBucketL2,
    PerBucketMax,
    PerBucketMinMax,
    RunningRange,
    ShiftedUint2DynamicActPerTensorFloatStochastic,
    SignMagnitude,
    StochasticRounding,
)
from brevitas_bp.quant import ShiftedUint2Avg4DynamicActPerBucketFloatStochastic as Averages
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Uint2
from brevitas_bp.quant import ShiftedUint2Mix4DynamicActPerBucketFloatStochastic as Mix
from tests.support import same_bits


class Downwards(nn.Module):
    """A custom rounding of a user, easy to tell from the others."""

    bucketwise = True

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.floor()


class OwnRounding(PerBucketMinMax, ActQuantSolver):
    bit_width = 2
    bucket_size = 64
    float_to_int_impl = Downwards


class OwnMax(StochasticRounding, PerBucketMax, ActQuantSolver):
    bit_width = 2
    bucket_size = 64


class OwnL2(PerBucketL2, ActQuantSolver):
    bit_width = 3
    bucket_size = 64


class OwnMagnitudes(SignMagnitude, ActQuantSolver):
    bit_width = 3


class IntegerZeroPoint(PerBucketMinMax, ActQuantSolver):
    bit_width = 2
    quantize_zero_point = True


class Bfloat16(StochasticRounding, PerBucketMinMax, ActQuantSolver):
    bit_width = 2
    metadata_dtype = torch.bfloat16


class Running(RunningRange, ShiftedUint2DynamicActPerTensorFloatStochastic):
    pass


X = torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
OWN: list[Any] = [
    OwnRounding, OwnMax, OwnL2, OwnMagnitudes, IntegerZeroPoint, Bfloat16, Mix,
    ShiftedUint2DynamicActPerTensorFloatStochastic]


def alike(first: Codec, second: Codec) -> bool:
    """Whether two codecs store the same bytes and decode to the same values."""
    a, b = first.encode(X, seed=3), second.encode(X, seed=3)
    return all(map(torch.equal, a.tensors, b.tensors)) and same_bits(a.decode(), b.decode())


def configured(config: Any, **settings: Any) -> Codec:
    """Returns the codec of a config with one width."""
    if config is Mix:
        return codec_from(Uint2, **settings)
    return codec_from(config, **settings)


# A variant keeps the user's quantizer.


@pytest.mark.parametrize("config", OWN)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_variant_is_what_the_config_gives_with_that_width(config: Any, bits: int) -> None:
    codec = codec_from(config)
    assert codec.bit_widths and min(codec.bit_widths) < bits
    expected = configured(config, bit_width=bits)
    for found in (codec.variant(bits), codec.at_least(bits)):
        assert found is not None and found.bit_widths == (bits,)
        assert found.name == expected.name
        assert alike(found, expected)


@pytest.mark.parametrize("config", OWN)
def test_a_variant_may_have_other_buckets_and_averages(config: Any) -> None:
    codec = codec_from(config)
    found = codec.variant(4, bucket_size=32)
    assert found is not None and alike(found, configured(config, bit_width=4, bucket_size=32))
    averages = codec.variant(4, 32, 2)
    assert isinstance(averages, AverageCodec) and alike(averages, AverageCodec(found, 2))
    # The configured codec is unchanged.
    assert alike(codec, codec_from(config))


def test_the_control_tells_a_rounding_and_a_rule_of_ones_own_from_others() -> None:
    nearest = codec_from(PerBucketMinMaxNearest)
    for config in (OwnRounding, OwnMax, OwnL2):
        assert not alike(codec_from(config, bit_width=4), nearest)


class PerBucketMinMaxNearest(PerBucketMinMax, ActQuantSolver):
    bit_width = 4
    bucket_size = 64


def test_the_modules_of_a_variant_are_those_of_the_user() -> None:
    codec = codec_from(OwnRounding)
    wide = codec.at_least(4)
    assert isinstance(codec, ModuleCodec) and isinstance(wide, ModuleCodec)
    assert wide.quantizer.int_quant is codec.quantizer.int_quant
    assert wide.quantizer.scaling_impl is codec.quantizer.scaling_impl
    assert codec.quantizer.bit_widths == (2,)
    assert float(codec.quantizer.msb_clamp_bit_width_impl()) == 2


def test_rows_of_a_variant_are_those_of_the_config() -> None:
    for config in (OwnRounding, OwnMax):
        wide = codec_from(config).at_least(4)
        assert alike(wide.in_rows(100, 300), codec_from(config, bit_width=4).in_rows(100, 300))


# Each variant is made once.


@pytest.mark.parametrize("config", [OwnRounding, OwnMax, Averages, Mix])
def test_a_variant_is_made_once_and_lives_no_longer_than_its_codec(config: Any) -> None:
    codec = codec_from(config)
    wide, averages = codec.variant(8), codec.variant(8, None, 4)
    assert wide is not None and averages is not None
    assert codec.variant(8) is wide and codec.at_least(8) is wide and wide.at_least(3) is wide
    assert codec.variant(8, None, 4) is averages
    assert wide.is_variant_of(codec) and averages.is_variant_of(codec) and codec.is_variant_of(codec)
    assert not codec_from(config, bit_width=8).is_variant_of(codec)
    gone = [weakref.ref(c) for c in (codec, wide, averages)]
    del codec, wide, averages
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]


def test_a_codec_that_is_wide_enough_is_itself() -> None:
    codec = codec_from(OwnMax)
    assert codec.at_least(1) is codec and codec.at_least(2) is codec and codec.variant(2) is codec
    averages = codec_from(Averages)
    assert averages.at_least(2) is averages.per_element and averages.variant(2) is averages.per_element
    assert averages.per_element.is_variant_of(averages)
    mix = codec_from(Mix)
    assert mix.at_least(2) is mix and mix.variant(2) is not mix


# Codecs without widths.


def _per_sample() -> Codec:
    return PerSampleCodec(Uint2, 2.5)


WITHOUT: dict[str, Callable[[], Codec]] = {
    "exact": Keep, "mask": BitMask, "stock": lambda: codec_from(Int8ActPerTensorFloat, signed=True),
    "running": lambda: codec_from(Running), "per sample": _per_sample,
    "on backward": lambda: QuantizeOnBackward(codec_from(Uint2)),
    "sign": lambda: sign_exact(codec_from(Uint2))}


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_codec_without_widths_has_no_variants(kind: str) -> None:
    codec = WITHOUT[kind]()
    assert codec.bit_widths == () and codec.variant(4) is None and codec.per_element is codec
    if kind != "per sample":
        assert codec.at_least(8) is codec
    with pytest.raises(ValueError, match="is no bucket quantizer"):
        Candidate(4).codec(codec)


# Widths that a quantizer cannot use.


@pytest.mark.parametrize("config", [OwnMax, OwnMagnitudes])
def test_one_bit_of_signed_codes_is_refused_by_name(config: Any) -> None:
    codec = codec_from(config)
    with pytest.raises(ValueError, match="got 1"):
        codec.variant(1)
    with pytest.raises(ValueError, match=rf"'{codec.name}' cannot store '1@64'.*leave '1@64' out"):
        Candidate.parse("1@64").codec(codec)


def test_modules_refuse_one_bit_of_signed_codes_too() -> None:
    lowered = codec_from(OwnMax)
    assert isinstance(lowered, LoweredCodec)
    with pytest.raises(ValueError, match="1 bits leave no level on both sides of zero"):
        ModuleCodec(lowered.quantizer).variant(1)


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


def test_a_plan_says_at_once_which_candidate_the_quantizer_cannot_have() -> None:
    x = torch.randn(64, 64)
    with pytest.raises(ValueError, match="cannot store '1'"):
        plan_bit_widths(_net(), x, _loss, act_quant=OwnMax, average_bits=3, candidates=(1, 2, 4, 8))
    plan = plan_bit_widths(_net(), x, _loss, act_quant=OwnMax, average_bits=3, candidates=(2, 4, 8))
    assert {t.chosen for t in plan.tensors} <= {"2", "4", "8"}


# The wrapper's variants keep the user's quantizer.


class Noting(StochasticRound):
    """A custom rounding that records the widths of the codes it makes."""

    seen: ClassVar[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(round(float(x.max())))
        return super().forward(x)


class Noted(PerBucketMinMax, ActQuantSolver):
    bit_width = 2
    bucket_size = 64
    float_to_int_impl = Noting


def levels(**options: Any) -> list[float]:
    """Returns the top codes that the user's rounding made, for the network's three saved tensors."""
    model = QuantBackwardWrapper(_net(), Noted, **options)
    Noting.seen.clear()
    model(torch.randn(64, 64, requires_grad=True))
    return Noting.seen.copy()


def test_a_rounding_of_ones_own_is_asked_at_every_width() -> None:
    assert levels() == [3, 15, 3]
    assert levels(policy=OpAware(multiplier_bits=3)) == [3, 7, 3]
    assert levels(overrides={"0": 8, "1": 3}) == [255, 15, 3]
    assert levels(plan={"0:*": 4, "1:*": 8, "2:*": "2@32"}) == [15, 255, 3]


@pytest.mark.parametrize(("config", "name"), [(OwnMax, "narrow"), (OwnL2, "l2")])
def test_a_scale_rule_of_ones_own_stays_with_the_derivative(config: Any, name: str) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    widths = {"multiplier_bits": 6}

    def gradient(**policy: Any) -> Tensor:
        model = QuantBackwardWrapper(nn.Tanh(), config, policy=OpAware(**policy), seed=0)
        return torch.autograd.grad(model(x).sum(), x)[0]

    other = codec_from(config, bit_width=6)
    assert torch.equal(gradient(**widths), gradient(multiplier_quant=other))
    assert not torch.equal(gradient(**widths), gradient(multiplier_quant=codec_from(
        Uint2, bit_width=6, bucket_size=64)))


# One codec per site.


def test_wrapping_codecs_have_the_site_of_what_they_wrap() -> None:
    stateful = codec_from(Running)
    assert isinstance(stateful, StatefulCodec) and stateful.per_site
    own = stateful.at_site("a")
    assert own is stateful.at_site("a") and own is not stateful.at_site("b") and not own.per_site
    undo = Undo(torch.ones(8), 1e30, torch.zeros(8), 300)
    around: list[Any] = [
        sign_exact(stateful), ReorderedCodec(stateful, (1, 0)),
        NormalizedCodec(stateful, undo.forward(torch.zeros(8)), undo),
        QuotientCodec(lambda: torch.ones(8, 300), stateful)]
    for codec in around:
        assert codec.per_site
        found = codec.at_site("a")
        assert type(found) is type(codec) and found.inner is own and not found.per_site
        assert list(codec.quantizers()) == list(stateful.quantizers())
    assert len(list(stateful.quantizers())) == 2


def test_slopes_of_prelu_have_a_running_range_for_each_site() -> None:
    model = QuantBackwardWrapper(
        nn.Sequential(nn.PReLU(), nn.PReLU()), Running, policy=OpAware(), seed=0)
    x = torch.randn(64, 64, requires_grad=True)
    plain = [torch.autograd.grad(copy.deepcopy(model.module)(x).sum(), x)[0]]
    for _ in range(2):
        (grad,) = torch.autograd.grad(model(x).sum(), x)
        # The sign is exact.
        assert torch.equal(grad, plain[0])
    assert {site.stored for site in model.explain().sites.values()} == {"sign and negative part"}
    assert len(list(model.quantizer_modules())) == 2


# Forms in a graph, derivatives and normalized tensors.


def test_who_has_a_form_in_a_graph_says_so() -> None:
    plain = GraphTensor(None, torch.float32)
    codecs = [codec_from(Uint2), codec_from(Mix), codec_from(Averages), BitMask()]
    forms = [codec.in_graph(plain) for codec in codecs]
    assert [form and form.name for form in forms] == [
        "2-bit stochastic", "4-bit stochastic", "2-bit stochastic", "bit mask"]
    assert all(codec.in_graphs for codec in codecs)
    without = [make() for make in WITHOUT.values() if make is not BitMask]
    without += [codec_from(OwnRounding), FewBitCodec(_table())]
    assert not any(codec.in_graphs for codec in without)
    assert all(codec.in_graph(plain) is None for codec in without)


def _table() -> Any:
    from brevitas_bp.activations.few_bit import few_bit_table

    return few_bit_table("silu", 2)


class Halves(Codec):
    """A codec that only encodes and decodes."""

    name = "halves"

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        layout = self.layout_of(x, where)
        return Packed(self, (layout.flatten(x.detach()).to(torch.float16),), layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        return packed.layout.restore_flat(packed.tensors[0].to(packed.layout.dtype))


def test_a_codec_that_only_encodes_and_decodes_takes_derivatives_and_normalized_tensors() -> None:
    codec = Halves()
    y = X.tanh()
    decoded = codec.encode_derivative(y, "tanh", seed=0).decode()
    assert (decoded - (1 - y * y)).abs().max() < 1e-3
    undo = Undo(torch.full((8,), 1000.0), 1e30, torch.full((8,), 5.0), 300)
    affine = undo.forward(torch.full((8,), 5.0))
    packed = codec.encode_normalized(X / 1000 + 5, affine, seed=0)
    assert (packed.decode() - X).abs().max() < 5e-3
    assert (codec.decode_normalized(packed, undo()) - X / 1000 - 5).abs().max() < 5e-6


@pytest.mark.parametrize("config", [Uint2, OwnMax, Mix])
def test_the_fused_forms_give_the_bytes_of_the_general_ones(config: Any) -> None:
    codec = codec_from(config)
    assert isinstance(codec, LoweredCodec)
    general = Codec.encode_derivative(codec, X.tanh(), "tanh", seed=2)
    fused = codec.encode_derivative(X.tanh(), "tanh", seed=2)
    assert all(map(torch.equal, general.tensors, fused.tensors))
    undo = Undo(torch.linspace(1, 2, 8), 1e30, torch.linspace(-1, 1, 8), 300)
    affine = undo.forward(torch.linspace(-1, 1, 8))
    general = Codec.encode_normalized(codec, X, affine, seed=2)
    fused = codec.encode_normalized(X, affine, seed=2)
    assert all(map(torch.equal, general.tensors, fused.tensors))
    assert same_bits(
        Codec.decode_normalized(codec, general, undo()), codec.decode_normalized(fused, undo()))
