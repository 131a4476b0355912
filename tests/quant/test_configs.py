"""Ready-made configs do what their names say."""

import re
from typing import Any

import pytest
import torch
from brevitas.inject import ExtendedInjector

from brevitas_bp import codec_from, quant
from brevitas_bp.codec.average import AverageCodec
from brevitas_bp.codec.quantized import LoweredCodec
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import (
    CENTRED,
    DITHERED,
    L2,
    MAX,
    MIN_MAX,
    NARROW,
    NEAREST,
    NO_TRANSFORM,
    NORMAL,
    ROTATED,
    ROTATED_TWICE,
    STOCHASTIC,
    UNSIGNED,
    CodeRange,
    ScaleRule,
    Transform,
)

GRAMMAR = re.compile(
    r"(?P<kind>Int|ShiftedUint|RotatedUint|RotatedNormal)(?P<bits>\d)(Mix(?P<mix>\d)|Avg(?P<avg>\d))?"
    r"DynamicActPer(?P<per>Tensor|Bucket)Float(?P<l2>L2)?(?P<rounding>Stochastic|Dithered)?")
# Kind of codes -> scale rule, codes and transform.
KINDS: dict[str, tuple[ScaleRule, CodeRange, Transform]] = {
    "Int": (MAX, NARROW, NO_TRANSFORM),
    "ShiftedUint": (MIN_MAX, UNSIGNED, NO_TRANSFORM),
    "RotatedUint": (MIN_MAX, UNSIGNED, ROTATED),
    "RotatedNormal": (CENTRED, NORMAL, ROTATED_TWICE)}
ROUNDINGS = {None: NEAREST, "Stochastic": STOCHASTIC, "Dithered": DITHERED}
NAMED = [name for name in quant.act.__all__ if not name.startswith("Thesis")]
# Li, 2025: the four mixes of two widths -> probability of the second width.
MIXES = {(2, 4): 0.5, (2, 6): 0.3, (3, 6): 0.4, (4, 8): 0.2, (1, 2): 0.5, (1, 4): 0.25}


def spec_of(name: str) -> tuple[BucketQuantSpec, int]:
    """Returns the kernel's spec, and how many elements are averaged into one."""
    codec = codec_from(getattr(quant, name))
    lowered = codec.per_element
    assert isinstance(lowered, LoweredCodec)
    return lowered.spec, codec.average_size if isinstance(codec, AverageCodec) else 1


@pytest.mark.parametrize("name", NAMED)
def test_a_config_is_what_its_name_says(name: str) -> None:
    match = GRAMMAR.fullmatch(name)
    assert match is not None
    rule, code_range, transform = KINDS[match["kind"]]
    bits = int(match["bits"])
    mix = int(match["mix"]) if match["mix"] else None
    spec, average_size = spec_of(name)
    assert average_size == int(match["avg"] or 1)
    assert spec == BucketQuantSpec(
        bit_width=bits,
        bucket_size=256 if match["per"] == "Bucket" else None,
        scale_rule=L2 if match["l2"] else rule,
        code_range=code_range,
        rounding=ROUNDINGS[match["rounding"]],
        transform=transform,
        mix_bit_width=mix,
        mix_prob=0.0 if mix is None else MIXES[bits, mix])


# Codes of the nearest level, after a random rotation, and dithered codes draw already.
DETERMINISTIC = [name for name in NAMED if name.endswith(("Float", "L2")) and "Rotated" not in name]


@pytest.mark.parametrize("name", [f"{name}Stochastic" for name in DETERMINISTIC])
def test_every_deterministic_config_has_a_stochastic_twin(name: str) -> None:
    assert name in NAMED


def test_the_grid_of_configs_is_complete() -> None:
    expected = {
        *(f"ShiftedUint{b}DynamicActPer{p}Float" for b in (1, 2, 3, 4, 8)
          for p in ("Bucket", "Tensor")),
        *(f"Int{b}DynamicActPer{p}Float" for b in (2, 4, 8) for p in ("Bucket", "Tensor")),
        *(f"Int{b}DynamicActPerBucketFloatL2" for b in (2, 4, 8)),
        *(f"ShiftedUint{b}DynamicActPerBucketFloat" for b in ("2Avg2", "2Avg4", "2Avg8", "4Avg2"))}
    assert set(DETERMINISTIC) == expected
    drawing = {
        *(f"Rotated{kind}" for kind in (
            *(f"Normal{b}DynamicActPerBucketFloat" for b in (1, 2, 3, 4, 8, "1Mix2", "1Mix4", "2Mix4")),
            *(f"Uint{b}DynamicActPerBucketFloatDithered" for b in (1, 2, 3, 4, 8)))),
        *(f"ShiftedUint{b}DynamicActPerBucketFloatDithered" for b in (1, 2, 3, 4, 8)),
        *(f"ShiftedUint{b}DynamicActPerTensorFloatDithered" for b in (4, 8))}
    assert {name for name in NAMED if "Rotated" in name or "Dithered" in name} == drawing


def test_every_public_name_is_an_injector() -> None:
    for name in quant.__all__:
        assert issubclass(getattr(quant, name), ExtendedInjector), name


@pytest.mark.parametrize("name", quant.act.__all__)
def test_every_config_says_what_it_is(name: str) -> None:
    assert getattr(quant, name).__doc__


@pytest.mark.parametrize("override", [
    {"bit_width": 4}, {"bucket_size": 64}, {"bucket_size": None},
    {"metadata_dtype": torch.bfloat16}, {"integer_zero_point": True}])
def test_settings_can_be_overridden_by_keyword(override: dict[str, Any]) -> None:
    keyword = {"integer_zero_point": "quantize_zero_point"}
    codec = codec_from(
        quant.ShiftedUint2DynamicActPerBucketFloat,
        **{keyword.get(name, name): setting for name, setting in override.items()})
    assert isinstance(codec, LoweredCodec)
    assert codec.spec == BucketQuantSpec(**{"rounding": NEAREST} | override)


@pytest.mark.parametrize("impl", ["stochastic_round", "STOCHASTIC_ROUND"])
def test_rounding_is_one_enum_away(impl: str) -> None:
    codec = codec_from(
        quant.ShiftedUint2DynamicActPerBucketFloat, float_to_int_impl_type=impl.lower())
    assert isinstance(codec, LoweredCodec) and codec.spec.rounding is STOCHASTIC
