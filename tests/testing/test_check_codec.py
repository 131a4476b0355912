"""``check_codec``: each check finds the defect that it is for, and all codecs of the library pass."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from brevitas_bp import Codec, codec_from, quant
from brevitas_bp.activations.few_bit import few_bit_table
from brevitas_bp.codec import BitMask, Copy, FewBitCodec, Keep, NarrowInt, PerSampleCodec
from brevitas_bp.codec.lossless import narrow_to
from brevitas_bp.codec.quantized import ModuleCodec
from brevitas_bp.codec.regions import dropout_mask, sign
from brevitas_bp.errors import UnknownNameError
from brevitas_bp.testing import CODEC_CHECKS, check_codec
from tests.codec.test_bucket_codecs import general, lowered
from tests.codec.test_stock import ALL, config_of
from tests.robustness.payloads import LOSSLESS
from tests.strategies import normals
from tests.testing.codecs import BROKEN, Aliases, Sound


def others(*names: str) -> list[str]:
    return [name for name in CODEC_CHECKS if name not in names]


@pytest.mark.parametrize(("check", "broken", "settings", "told"), BROKEN)
def test_a_broken_codec_is_found(
        check: str, broken: type[Codec], settings: dict[str, Any], told: str) -> None:
    with pytest.raises(AssertionError, match=told) as caught:
        check_codec(broken(), without=others(check), **settings)
    text = str(caught.value)
    assert f"fails the check {check!r}" in text and CODEC_CHECKS[check].invariant in text
    # Without the check, nothing is wrong that the check is for.
    assert check not in check_codec(broken(), without=list(CODEC_CHECKS), **settings)


def test_every_check_has_a_broken_codec() -> None:
    assert {check for check, *_ in BROKEN} == set(CODEC_CHECKS)


def test_a_sound_codec_passes_all_checks() -> None:
    ran = check_codec(Sound(), stochastic=True, largest_error=0.02)
    assert set(ran) == set(CODEC_CHECKS) - {"signs"}


def test_checks_that_promise_nothing_are_left_out() -> None:
    ran = check_codec(Keep())
    assert not {"ownership", "memory", "refused dtypes", "seeds"} & set(ran)
    assert "ownership" in check_codec(Copy())


@pytest.mark.parametrize("found", [True, False])
def test_generators_are_afterwards_as_they_were(found: bool) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    if found:
        with pytest.raises(AssertionError):
            check_codec(Aliases())
    else:
        check_codec(Sound())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), repr(np.random.get_state())) == before[1:]


# Codecs of the library; those of ready-made configs are in tests/codec/test_bucket_codecs.py.


# Brevitas' scales have a smallest value, 1e-10, or are constant.
@pytest.mark.parametrize("name", [
    "Int8ActPerTensorFloat", "Int8ActPerTensorFixedPoint",
    "Uint8ActPerTensorFloatMaxInit", "SignedTernaryActPerTensorConst", "Fp8e4m3Act",
    "Fp8e5m2OCPActPerTensorFloat"])
def test_codecs_of_brevitas_own_configs(name: str) -> None:
    without = ["tiny values"]
    if "MSE" in name or "HQO" in name:
        without += ["pickles"]  # Brevitas makes these classes in a function.
    if "Uint8" in name and "Shifted" not in name:
        without += ["order"]
    check_codec(codec_from(config_of(name), **ALL[name]), without=without)


@pytest.mark.parametrize("name", ["MXInt8Act", "MXFloat8e4m3Act"])
def test_groups_along_a_dimension(name: str) -> None:
    # Tensors need the dimension that groups run along. Scales, powers of two, overflow.
    x = normals((4, 40, 3, 5)).float()
    check_codec(codec_from(config_of(name), **ALL[name]), values=x,
                without=["small tensors", "huge values", "tiny values"])


def test_one_of_them_in_a_network() -> None:
    codec = general("ShiftedUint2Mix4DynamicActPerBucketFloatStochastic")
    assert isinstance(codec, ModuleCodec)
    assert check_codec(codec, without=others("wrapper")) == ("wrapper",)


EXACT: dict[str, Codec] = {
    "copy": Copy(), "keep": Keep(), "bit mask": BitMask(), "narrowed": NarrowInt(),
    "indices": narrow_to(97, signed=False)}


@pytest.mark.parametrize("name", EXACT)
def test_exact_codecs(name: str) -> None:
    assert "wrapper" in check_codec(EXACT[name], stochastic=False)


def test_codecs_for_each_sample_and_for_elements_of_derivatives() -> None:
    config = quant.ShiftedUint2DynamicActPerBucketFloatStochastic
    check_codec(PerSampleCodec(config, average_bits=2), stochastic=True)
    for codec in (lowered("RotatedNormal2DynamicActPerBucketFloat").for_factors,
                  lowered("RotatedNormal2DynamicActPerBucketFloat").for_values):
        check_codec(codec, stochastic=True)
    probabilities = lowered("RotatedNormal2DynamicActPerBucketFloat").for_probabilities
    assert probabilities is not None and probabilities.keeps_sign
    assert "signs" in check_codec(probabilities, stochastic=True)


def test_codecs_that_decode_to_something_else() -> None:
    check_codec(sign(), decodes_to=torch.sgn, stochastic=False)
    relu = FewBitCodec(few_bit_table("relu", 1))
    ran = check_codec(
        relu, decodes_to=lambda x: torch.where(x.isnan(), x, (x > 0).to(x.dtype)), stochastic=False)
    assert "wrapper" not in ran


def test_codecs_that_take_only_some_tensors() -> None:
    codec, mask = LOSSLESS["dropout"]()
    check_codec(codec, values=mask, without=["non-finite", "huge values", "tiny values", "ownership"])
    assert type(codec) is type(dropout_mask(0.3))
    codec, indices = LOSSLESS["3x3 windows"]()
    # Other layouts, and writes, change the indices to some that no window has.
    changed = ["small tensors", "strides", "order", "ownership", "immutability"]
    assert len(check_codec(codec, values=[indices], without=changed)) > 10


# Arguments.


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(TypeError, match=r"expected a Codec, got <class .*; codec_from\(config\) makes"):
        check_codec(quant.ShiftedUint2DynamicActPerBucketFloat)  # pyright: ignore
    with pytest.raises(UnknownNameError, match="no check 'stride' to leave out; did you mean 'strides'"):
        check_codec(Sound(), without=["stride"])
    with pytest.raises(ValueError, match="largest_error must be > 0, got 0"):
        check_codec(Sound(), largest_error=0)
    for none in ([], torch.empty(0)):
        with pytest.raises(ValueError, match="values must be a tensor or a list of tensors"):
            check_codec(Sound(), values=none)


def test_values_replace_the_tensors_that_are_tried() -> None:
    x = torch.linspace(-1, 1, 600).view(20, 30)
    assert "strides" in check_codec(Sound(), values=x)
    with pytest.raises(AssertionError, match=r"values\[0\] \(float32 \[20, 30\]\)"):
        check_codec(Sound(), values=[x], largest_error=1e-4)
