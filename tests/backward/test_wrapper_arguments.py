"""Arguments that ``QuantBackwardWrapper`` accepts, and how it refuses others."""

import re
from typing import Any

import pytest
import torch
from brevitas.nn import QuantIdentity
from brevitas.quant import SignedBinaryActPerTensorConst
from torch import Tensor, nn

from brevitas_bp import (
    QuantBackwardWrapper,
    UnknownNameError,
    UnsupportedQuantizerError,
    codec_from,
    track_saved_memory,
)
from brevitas_bp.quant import (
    ActQuantSolver,
    PerBucketMinMax,
    ShiftedUint2DynamicActPerBucketFloatStochastic,
    ShiftedUint4DynamicActPerBucketFloat,
    ShiftedUint8DynamicActPerBucketFloat,
    StochasticRounding,
)
from tests.backward.support import QUANTIZING, assert_same, run

Uint4 = ShiftedUint4DynamicActPerBucketFloat
Uint8 = ShiftedUint8DynamicActPerBucketFloat


def layer() -> nn.Module:
    """Returns a layer that saves only its input, with the configured codec under every policy."""
    return nn.Linear(256, 256)


def small_net() -> nn.Module:
    """Returns modules that each save one activation of 64 x 256 values."""
    return nn.Sequential(
        nn.Sequential(layer(), layer()), nn.ModuleDict({"layer": layer()})["layer"], layer())


def bits_by_module(model: nn.Module) -> dict[str, float]:
    """Returns bits of code per element; buckets of 256 have 8 bytes of metadata."""
    with track_saved_memory(model) as report:
        output = model(torch.randn(64, 256, requires_grad=True))
    del output
    return {
        row.module: 32 if row.ratio == 1 else (row.stored_bytes - 64 * 8) * 8 / (64 * 256)
        for row in report.rows}


def site_reasons(model: QuantBackwardWrapper) -> dict[str, str]:
    """Returns module -> the reason for how its last saved tensor is stored."""
    return {site.module: site.reason for site in model.explain().sites.values()}


# Quantizers and their settings.


class Mine(StochasticRounding, PerBucketMinMax, ActQuantSolver):
    """The three-line config of the design page."""

    bit_width = 3
    bucket_size = 512


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize(("quantizer", "settings", "bits"), [
    (ShiftedUint2DynamicActPerBucketFloatStochastic, {}, 2),
    (ShiftedUint2DynamicActPerBucketFloatStochastic, {"bit_width": 5}, 5),
    (Mine, {"bucket_size": 256}, 3),
    (codec_from(Uint8), {}, 8),
    (QuantIdentity(act_quant=Uint4).act_quant, {}, 4),
    (None, {}, 32)])
def test_quantizer_and_settings(
        quantizer: Any, settings: dict[str, Any], bits: float, policy: str) -> None:
    model = QuantBackwardWrapper(small_net(), quantizer, policy=policy, **settings)
    assert set(bits_by_module(model).values()) == {bits}


def test_default_is_two_bits_rotated() -> None:
    model = QuantBackwardWrapper(small_net())
    assert set(bits_by_module(model).values()) == {2}
    assert "2-bit rotated" in repr(model)


# Overrides.


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize(("overrides", "expected"), [
    ({"0.*": None}, {"0.0": 32, "0.1": 32, "1": 2, "2": 2}),
    ({"0": None}, {"0.0": 32, "0.1": 32, "1": 2, "2": 2}),  # a module stands for what it contains
    ({"0.1": Uint4}, {"0.0": 2, "0.1": 4, "1": 2, "2": 2}),
    ({"[12]": Uint8}, {"0.0": 2, "0.1": 2, "1": 8, "2": 8}),
    ({"0.0": Uint8, "0": Uint4}, {"0.0": 8, "0.1": 4, "1": 2, "2": 2}),
    ({"*": None}, {"0.0": 32, "0.1": 32, "1": 32, "2": 32})])
def test_overrides(overrides: dict[str, Any], expected: dict[str, float], policy: str) -> None:
    model = QuantBackwardWrapper(small_net(), overrides=overrides, policy=policy)
    assert bits_by_module(model) == expected


@pytest.mark.parametrize(("override", "bits"), [
    (Uint8, 8), (Uint4, 4), (ShiftedUint2DynamicActPerBucketFloatStochastic, 4), (None, 32)])
def test_override_reaches_derivatives(override: Any, bits: float) -> None:
    # At least four bits, unless the module has to be exact.
    module = nn.Sequential(nn.Tanh(), layer())
    model = QuantBackwardWrapper(module, overrides={"0": override})
    # The output kept by an exact module is the next module's input: keeping a reference is free.
    assert bits_by_module(model) == ({"0": 32} if override is None else {"0": bits, "1": 2})


@pytest.mark.parametrize("policy", QUANTIZING)
def test_override_may_quantize_one_module_of_an_exact_model(policy: str) -> None:
    model = QuantBackwardWrapper(small_net(), None, overrides={"1": Uint4}, policy=policy)
    assert bits_by_module(model) == {"0.0": 32, "0.1": 32, "1": 4, "2": 32}


@pytest.mark.parametrize("policy", QUANTIZING)
def test_operation_outside_of_submodules_belongs_to_the_module_that_runs_it(policy: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Tanh())
            self.scale = nn.Parameter(torch.ones(256))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * self.scale

    model = QuantBackwardWrapper(Net(), overrides={"body": None}, policy=policy)
    # The op-aware policy stores a reference to the tensor that the exact module keeps.
    outside = {"": 2} if policy == "all" else {}
    assert bits_by_module(model) == {"body.0": 32, **outside}
    assert site_reasons(model)[""] == (
        "policy quantize_all" if policy == "all" else "another operation keeps it exact")


# Bad input. Every message says what was expected, what was given, and what to do.

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown setting": ({"bucket_sise": 256}, UnknownNameError, "'bucket_sise'.*'bucket_size'"),
    "two unknown settings": (
        {"bucket_sise": 256, "bit_with": 2}, UnknownNameError, "did you mean 'b(ucket_size|it_width)'"),
    "width 0": ({"bit_width": 0}, ValueError, r"must be an integer in 1\.\.8, got 0"),
    "width 9": ({"bit_width": 9}, ValueError, r"must be an integer in 1\.\.8, got 9"),
    "odd bucket": ({"bucket_size": 100}, ValueError, "multiple of 8.*got 100"),
    "negative bucket": ({"bucket_size": -8}, ValueError, "multiple of 8.*got -8"),
    "class": ({"module": nn.Linear}, TypeError, "instance, got the class Linear"),
    "function": ({"module": torch.relu}, TypeError, "must be a torch.nn.Module instance, got"),
    "None": ({"module": None}, TypeError, "instance, got None"),
    "policy": ({"policy": "al"}, UnknownNameError, r"one of \['all', .*got 'al'; did you mean 'all'"),
    "no policy": ({"policy": None}, UnknownNameError, "policy must be one of .* got None"),
    "storage": (
        {"storage": "save_quantised"}, UnknownNameError, "did you mean 'save_quantized'"),
    "rank": ({"rank": 0.5}, TypeError, "rank must be an integer or None, got 0.5"),
    "seed": ({"seed": "7"}, TypeError, "seed must be an integer or None, got '7'"),
    "number as quantizer": ({"act_quant": 2}, TypeError, "expected a Brevitas config class.*got 2"),
    "name as quantizer": ({"act_quant": "Uint2"}, TypeError, "expected a Brevitas config class"),
    "other class as quantizer": ({"act_quant": nn.ReLU}, TypeError, "expected a Brevitas config"),
    "layer as quantizer": ({"act_quant": nn.ReLU()}, UnsupportedQuantizerError, "cannot store what"),
    "binary quantizer": (
        {"act_quant": SignedBinaryActPerTensorConst, "scaling_init": 1.0},
        UnsupportedQuantizerError, "binary quantizers give signs"),
    "settings of nothing": (
        {"act_quant": None, "bit_width": 2}, TypeError, r"settings \['bit_width'\] would do nothing"),
    "settings of a codec": (
        {"act_quant": codec_from(Uint4), "bit_width": 2}, TypeError, r"\['bit_width'\] would do noth"),
    "settings of a proxy": (
        {"act_quant": QuantIdentity(act_quant=Uint4).act_quant, "bit_width": 2}, TypeError,
        "need a config class"),
    "pattern": ({"overrides": {"0.7": None}}, UnknownNameError, "'0.7' in overrides matches no module"),
    "overrides as a list": ({"overrides": [("0", None)]}, TypeError, "overrides must map globs"),
    "pattern that is no text": ({"overrides": {0: None}}, TypeError, "overrides must map globs"),
    "override as a number": ({"overrides": {"0": 9}}, ValueError, "must be an integer in 1..8, got 9"),
    "override of no quantizer": (
        {"act_quant": None, "overrides": {"0": 4}}, TypeError, "a width of act_quant, which is None"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_refused(name: str) -> None:
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        QuantBackwardWrapper(**{"module": small_net(), **arguments})


def test_pattern_without_a_match_names_the_nearest_module() -> None:
    module = nn.ModuleDict({"encoder": nn.Linear(2, 2), "classifier": nn.Linear(2, 2)})
    with pytest.raises(UnknownNameError, match=re.escape("did you mean 'classifier'?")):
        QuantBackwardWrapper(module, overrides={"clasifier": None})


def test_refused_arguments_leave_the_module_as_it_was() -> None:
    module, x = small_net(), torch.randn(8, 256)
    before = run(module, x)
    with pytest.raises(UnknownNameError):
        QuantBackwardWrapper(module, bucket_sise=256)
    assert_same(run(module, x).grads, before.grads)
