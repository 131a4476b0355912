"""Rotated, dithered and level codes of awkward values: constant, tiny, huge, NaN, short and long."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from brevitas_bp.format import reference
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import (
    CENTRED,
    DITHERED,
    NEAREST,
    NO_TRANSFORM,
    NORMAL,
    ROTATED,
    ROTATED_TWICE,
    STOCHASTIC,
    UNBIASED,
)
from brevitas_bp.kernels import dispatch
from tests.format.rotated import ENERGY, levels_spec, strict_spec
from tests.strategies import FINITE, RULES, float_tensors, normals, seeds
from tests.support import same_bits

DITHER = BucketQuantSpec(2, 256, rounding=DITHERED)
SPECS = {
    "levels": levels_spec(2),
    "levels, 1 bit": levels_spec(1),
    "levels, 8 bits": levels_spec(8),
    "levels, one rotation": levels_spec(2, ROTATED, 64),
    "levels, no rotation": levels_spec(3, NO_TRANSFORM, 64),
    "levels, bfloat16": replace(levels_spec(2), metadata_dtype=torch.bfloat16),
    "levels, no mean": BucketQuantSpec(2, 256, UNBIASED, NORMAL, NEAREST, transform=ROTATED_TWICE),
    "strict": strict_spec(2),
    "strict, bfloat16": replace(strict_spec(4), metadata_dtype=torch.bfloat16),
    "dither": DITHER,
    "dither, bfloat16": replace(DITHER, metadata_dtype=torch.bfloat16),
    "two widths": replace(levels_spec(1), mix_bit_width=4, mix_prob=0.5)}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
each_kernel = pytest.mark.parametrize("kernels", [dispatch, reference], ids=["fastest", "reference"])
CONSTANTS = (0.0, -0.0, 3.7, -1e30, 1e-30, 1e-40, -3e38, 3.4028234e38)


def round_trip(x: Tensor, spec: BucketQuantSpec, seed: int = 5, kernels: object = dispatch) -> Tensor:
    flat = x.reshape(-1)
    encoded = kernels.encode(flat, spec, seed)  # type: ignore[attr-defined]
    return kernels.decode(encoded, spec, seed, flat.numel(), flat.dtype)  # type: ignore[attr-defined]


# Constant buckets.


@each_kernel
@pytest.mark.parametrize("name", ["levels", "levels, 1 bit", "levels, no rotation", "dither"])
@pytest.mark.parametrize("value", CONSTANTS)
def test_a_constant_bucket_is_exact_with_float32_metadata(
        name: str, value: float, kernels: object) -> None:
    x = torch.full((700,), value)
    assert torch.equal(round_trip(x, SPECS[name], kernels=kernels), x)


@each_kernel
def test_a_constant_bucket_is_near_without_a_mean(kernels: object) -> None:
    x = torch.full((512,), 3.7)
    for name in ("levels, no mean", "strict"):
        error = (round_trip(x, SPECS[name], kernels=kernels) - x).norm() / x.norm()
        assert error < 1


@pytest.mark.parametrize("value", CONSTANTS)
def test_a_constant_bucket_with_bfloat16_metadata_keeps_what_rounding_its_mean_took(
        value: float) -> None:
    x = torch.full((512,), value)
    error = (round_trip(x, SPECS["levels, bfloat16"]).double() - x.double()).abs()
    # The mean is rounded to 8 digits (at least to a subnormal bfloat16). The rest is rotated as well.
    assert (error <= 2.0**-7 * abs(value) + 2.0**-132).all()


@each_spec
def test_zeros_have_zero_metadata_and_decode_to_zeros(spec: BucketQuantSpec) -> None:
    x = torch.zeros(600)
    assert not dispatch.encode(x, spec, 1).metadata.any()
    assert same_bits(round_trip(x, spec), x)


# Tiny and huge values.


@each_kernel
@each_spec
@pytest.mark.parametrize("exponent", [-90, -30, 30, 100])
def test_powers_of_two_scale_through(
        spec: BucketQuantSpec, exponent: int, kernels: object) -> None:
    x = normals((1000,), 2).float()
    plain, scaled = (kernels.encode(v, spec, 4) for v in (x, x * 2.0**exponent))  # type: ignore
    assert torch.equal(plain.payload, scaled.payload)
    assert torch.equal(plain.metadata * 2.0**exponent, scaled.metadata)


#: Factors that make normal values tiny, subnormal and nearly as large as possible.
FACTORS = (1e-30, 1e-40, 1e30, 6e37)


@each_kernel
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_tiny_and_huge_values_have_the_same_relative_error(
        factor: float, width: int, kernels: object) -> None:
    def energy(x: Tensor) -> float:
        decoded = round_trip(x, levels_spec(width), kernels=kernels).view_as(x).double()
        assert decoded.isfinite().all()
        centred = x.double() - x.double().mean(-1, keepdim=True)
        return float((decoded - x).square().sum() / centred.square().sum())

    ordinary = normals((100, 256), 2)
    expected, found = energy(ordinary.float()), energy((ordinary * factor).float())
    # Values of 1e-40 have 16 binary digits, and their scales, 1 / 256 of them, have 8.
    assert found == pytest.approx(expected, rel=2.0**-8)
    assert expected == pytest.approx(ENERGY[width], rel=0.05)


@each_spec
def test_the_largest_floats_decode_to_finite_values(spec: BucketQuantSpec) -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.full((512,), largest)
    x[::2] = -largest
    x[7] = 1.0
    assert round_trip(x, spec).isfinite().all()


@each_spec
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_values_stay_in_their_range(spec: BucketQuantSpec, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = (normals((1000,), 4) * largest / 2).clamp(-largest, largest).to(dtype)
    decoded = round_trip(x, spec)
    assert decoded.dtype == dtype and decoded.isfinite().all()


# NaN and Inf.


@each_kernel
@each_spec
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_element_breaks_its_bucket_and_no_other(
        spec: BucketQuantSpec, bad: float, kernels: object) -> None:
    assert spec.bucket_size is not None
    size = spec.bucket_size
    x = normals((3 * size + 5,), 3).float()
    broken = x.clone()
    broken[size + 3] = bad
    whole, found = (round_trip(v, spec, kernels=kernels) for v in (x, broken))
    inside = (torch.arange(len(x)) // size) == 1
    assert found[inside].isnan().all()
    assert same_bits(found[~inside], whole[~inside])


# Short and long tensors, and tails.


@each_kernel
@each_spec
@pytest.mark.parametrize("numel", [0, 1, 7, 16, 17, 255, 257])
def test_short_tensors(spec: BucketQuantSpec, numel: int, kernels: object) -> None:
    x = normals((numel,), numel).float() + 1
    decoded = round_trip(x, spec, kernels=kernels)
    assert decoded.shape == x.shape and decoded.isfinite().all()
    if numel == 1 and spec.scale_rule is CENTRED and spec.metadata_dtype == torch.float32:
        assert torch.equal(decoded, x)


@pytest.mark.parametrize("numel", [1, 7, 40, 300])
def test_padding_counts_neither_in_the_mean_nor_in_the_error(numel: int) -> None:
    # Far from zero, a mean that counted padding would leave most of the energy to the codes.
    x = normals((numel,), numel).float() + 1000
    error = round_trip(x, levels_spec(2)) - x
    assert error.abs().max() < 10
    spread = (x - x.mean()).norm()
    assert float(error.norm()) <= 0.6 * float(spread) + 1e-3


@pytest.mark.parametrize("length", [16, 40, 49, 192, 300])
def test_padding_of_rows_counts_neither(length: int) -> None:
    spec, rows = replace(levels_spec(2), row_size=None).in_rows(length), 12
    x = normals((rows, length), length).float()
    x = x * torch.logspace(-6, 3, rows).unsqueeze(-1) + 1000 * torch.logspace(-6, 3, rows).unsqueeze(-1)
    for kernels in (dispatch, reference):
        error = round_trip(x, spec, kernels=kernels).view_as(x) - x
        spread = (x - x.mean(-1, keepdim=True)).norm(dim=-1)
        # Means of 1000 deviations have an error of 2**-24 * 1000 deviations in each element.
        assert (error.norm(dim=-1) <= 0.6 * spread).all()


@pytest.mark.parametrize("name", ["levels", "levels, 1 bit", "strict", "dither"])
def test_ten_million_elements(name: str) -> None:
    numel, spec = 10_000_001, SPECS[name]
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    decoded = round_trip(x, spec)
    energy = float((decoded - x).double().square().mean())
    expected = {"levels": 0.132, "levels, 1 bit": 0.568, "strict": 0.30, "dither": 0.30}[name]
    assert energy == pytest.approx(expected, rel=0.01)
    # The last bucket, of one element, is centred exactly or within its range.
    assert decoded[-1].isfinite()
    encoded = dispatch.encode(x, spec, 5)
    buckets = -(-numel // 256)
    assert encoded.payload.numel() == buckets * 32 * spec.bit_width
    assert encoded.metadata.numel() == 2 * buckets


# Any tensor.


@st.composite
def drawn_specs(draw: st.DrawFn) -> BucketQuantSpec:
    """Draws a quantizer with levels, a rotation or dither."""
    transform = draw(st.sampled_from((NO_TRANSFORM, ROTATED, ROTATED_TWICE)))
    by_levels = draw(st.booleans())
    if by_levels:
        rule, code_range, rounding = draw(st.sampled_from((CENTRED, UNBIASED))), NORMAL, NEAREST
    else:
        rule, code_range = draw(st.sampled_from(RULES))
        rounding = DITHERED if transform is NO_TRANSFORM else draw(
            st.sampled_from((DITHERED, STOCHASTIC, NEAREST)))
    widths = st.integers(code_range.least_width, 8)
    mix = draw(st.none() | widths)
    return BucketQuantSpec(
        draw(widths), draw(st.sampled_from((16, 64, 256))), rule, code_range, rounding,
        metadata_dtype=draw(st.sampled_from((torch.float32, torch.bfloat16))),
        mix_bit_width=mix, mix_prob=0.0 if mix is None else 0.5, transform=transform)


@given(float_tensors(), drawn_specs(), seeds)
def test_any_finite_tensor_stays_finite_and_decodes_again(
        x: Tensor, spec: BucketQuantSpec, seed: int) -> None:
    flat = x.reshape(-1)
    encoded = dispatch.encode(flat, spec, seed)
    first, second = (
        dispatch.decode(encoded, spec, seed, flat.numel(), x.dtype) for _ in range(2))
    assert first.isfinite().all() and same_bits(first, second)


@given(float_tensors(), drawn_specs(), seeds)
def test_the_fastest_kernels_have_the_bytes_of_the_reference(
        x: Tensor, spec: BucketQuantSpec, seed: int) -> None:
    flat = x.reshape(-1).contiguous()
    fast, slow = (kernels.encode(flat, spec, seed) for kernels in (dispatch, reference))
    assert all(map(same_bits, fast.tensors, slow.tensors))
    assert same_bits(*(
        kernels.decode(slow, spec, seed, flat.numel(), x.dtype) for kernels in (dispatch, reference)))


@given(float_tensors(values=tuple(set(FINITE) - {"huge", "subnormal", "tiny"})), seeds)
def test_no_error_is_larger_than_the_worst_of_its_code(x: Tensor, seed: int) -> None:
    # The scale makes <x~ - m, x - m> = |x - m|**2, so the error has the tangent of the angle between
    # values and levels. With one bit, the cosine of that angle is at least 1 / sqrt(B).
    flat = x.reshape(-1)
    size = 16
    decoded = round_trip(flat, levels_spec(1, size=size), seed).double()
    digits = torch.finfo(x.dtype).eps
    for bucket, values in zip(flat.double().split(size), decoded.split(size)):
        spread = (bucket - bucket.mean()).norm()
        slack = 8 * size * max(digits, 2.0**-23) * bucket.norm() + torch.finfo(x.dtype).tiny
        assert (values - bucket).norm() <= spread * math.sqrt(size) + slack
