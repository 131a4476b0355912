"""Quantizers of rows, and the per-tensor quantizer with zero on the grid."""

import math
from typing import Any

import pytest
import torch
from brevitas.nn import QuantIdentity
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from brevitas_bp import UnsupportedQuantizerError, codec_from, quant
from brevitas_bp.format.random import seeded
from brevitas_bp.grad.quantizer import GradientQuantizer
from tests.stats import ALPHA, rounding_variance
from tests.strategies import DTYPES, dtype_name

PTQ = quant.ShiftedUint4DynamicGradPerTensorFloatStochastic
PSQ = quant.ShiftedUint4DynamicGradPerRowFloatStochastic
BHQ = quant.HouseholderUint4DynamicGradPerRowFloatStochastic
BHQ_DITHERED = quant.HouseholderUint4DynamicGradPerRowFloatDithered
PER_CHANNEL = quant.ShiftedUint8DynamicGradPerChannelFloatStochastic


class RotatedBHQ(
        quant.HouseholderRows, quant.RotatedBuckets, quant.PerBucketNormal, quant.ActQuantSolver):
    """Rows are mixed, and each bucket of the mixed rows is rotated."""

    bit_width = 4
    bucket_size = 32


KINDS = [PTQ, PSQ, BHQ, BHQ_DITHERED, PER_CHANNEL, RotatedBHQ]
each_kind = pytest.mark.parametrize("config", KINDS, ids=lambda c: c.__name__)


def quantizer(config: Any, **settings: Any) -> nn.Module:
    layer: Any = QuantIdentity(act_quant=config, **settings)
    return layer.act_quant.fused_activation_quant_proxy.tensor_quant


def empirical_bernstein(values: Tensor, tests: int) -> Tensor:
    """Returns the limit of the deviation of means over the first dimension, from the draws alone.

    Maurer and Pontil, 2009: ``sqrt(2 V log(4 / alpha) / n) + 7 R log(4 / alpha) / (3 (n - 1))`` for the
    sample variance V. The range R is taken to be twice the largest range of the draws in a row. float32
    arithmetic adds a few units in the last place.
    """
    n, log = len(values), math.log(4 * tests / ALPHA)
    spread = 2 * (values.amax(0) - values.amin(0)).amax(1, keepdim=True) + 1e-5 * values.abs().amax()
    return (2 * values.var(0) * log / n).sqrt() + 7 * spread * log / (3 * (n - 1))


def rows_of_any_size(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator).mul(2).exp()
    return torch.randn(shape, generator=generator) * scales


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [(8, 64), (6, 16, 4, 4), (7, 13), (1, 40), (5, 1), (9, 4001)])
def test_kernels_and_modules_agree(config: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """With equal noise: that of a row whose length is no multiple of 8 is padded in the kernels."""
    x = rows_of_any_size(*shape).to(dtype)
    module = quantizer(config)
    rounded = GradientQuantizer(module, "")(x, 3)
    with torch.no_grad(), seeded(3):
        value, scale, *_ = module(x)
    assert rounded.shape == value.shape == x.shape and rounded.dtype == value.dtype == dtype
    row = x.numel() // x.shape[config.row_dim if "row_dim" in config else 0]
    if config is PTQ or (row % 8 == 0 and (config is not RotatedBHQ or x.numel() % 32 == 0)):
        assert torch.equal(rounded, value)
    if config is PSQ:
        assert ((rounded.double() - x.double()).abs().flatten(1) <= 1.01 * scale.double()).all()


@each_kind
def test_memory_layout_and_values_of_images(config: Any) -> None:
    """The rows of a channels_last gradient are read as they lie, and keep their layout."""
    x = rows_of_any_size(6, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    rounded = GradientQuantizer(quantizer(config), "")(x, 3)
    assert rounded.stride() == x.stride()
    scale = (x.amax() - x.amin()) / 7
    assert float((rounded - x).abs().max()) <= float(scale) * 1.5


@each_kind
def test_special_inputs(config: Any) -> None:
    rounded = GradientQuantizer(quantizer(config), "")
    assert rounded(torch.zeros(0, 4), 1).shape == (0, 4)
    assert torch.equal(rounded(torch.zeros(3, 8), 1), torch.zeros(3, 8))
    x = rows_of_any_size(4, 32)
    x[1, 3] = math.nan
    nan = rounded(x, 1).isnan()
    assert nan[1].any()
    if config is PSQ:
        assert nan[1].all() and not nan[[0, 2, 3]].any()
    elif config is not PER_CHANNEL:
        assert nan.all()
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[largest, -largest] * 8, [1.0, 0.5] * 8])
    values = rounded(x, 1)
    assert values.isfinite().all()
    if config is PTQ:
        # The range is limited, so values near the largest float are clipped. They keep size and sign.
        assert (values[0] * x[0].sign() > 0.2 * largest).all()
    small = rows_of_any_size(4, 32) * 1e-30
    assert float((rounded(small, 1) - small).double().norm() / small.double().norm()) < 0.5


@pytest.mark.parametrize("config", [c for c in KINDS if c is not RotatedBHQ], ids=lambda c: c.__name__)
def test_unbiased_for_every_element(config: Any) -> None:
    """2,000 draws; the error of one draw is within the steps of the element's row, mixed or not."""
    x, draws = rows_of_any_size(8, 16), 2000
    rounded = GradientQuantizer(quantizer(config), "")
    values = torch.stack([rounded(x, seed) for seed in range(draws)]).double()
    off = (values.mean(0) - x.double()).abs()
    assert (off <= empirical_bernstein(values, x.numel())).all()
    # The power: a tenth more in half of the rows would be seen.
    wrong = values.mean(0) * torch.tensor([1.0, 1.1]).repeat(4)[:, None]
    assert ((wrong - x.double()).abs() > empirical_bernstein(values, x.numel())).any()
    # The control: rounding to nearest is off by far more, in the smallest unit there is.
    spread = (values - x).square().sum() / draws
    assert (values.mean(0) - x).square().sum() < 6 * spread / draws

    class Nearest(config):
        float_to_int_impl_type = "round"

    if "float_to_int_impl" not in vars(config) and config is not BHQ_DITHERED:
        fixed = GradientQuantizer(quantizer(Nearest), "")(x, 0).double()
        assert (fixed - x).square().sum() > 20 * spread / draws


def test_rotated_mixed_rows_are_unbiased_together() -> None:
    """Levels of the normal distribution are unbiased up to a few tenths of a percent."""
    x, draws = rows_of_any_size(16, 64), 1000
    rounded = GradientQuantizer(quantizer(RotatedBHQ), "")
    values = torch.stack([rounded(x, seed) for seed in range(draws)]).double()
    kept = (values.mean(0) * x).sum() / x.double().square().sum()
    assert float(kept) == pytest.approx(1, abs=0.01)


VALUES = st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=24)


@given(VALUES, st.integers(2, 8), st.sampled_from(["mixed", "positive", "negative", "nearly"]))
def test_zero_is_on_the_grid_and_nothing_clips(values: list[float], bits: int, kind: str) -> None:
    x = torch.tensor(values)
    x = {"mixed": x, "positive": x.abs(), "negative": -x.abs(), "nearly": x.abs()}[kind]
    x[0] = -1e-3 if kind == "nearly" else 0.0
    module = quantizer(PTQ, bit_width=bits)
    with torch.no_grad(), seeded(1):
        value, scale, zero_point, _ = module(x)
    code = zero_point.double()
    assert (code - code.round()).abs() < 1e-3 and 0 <= float(code.round()) <= 2**bits - 1
    assert (value[x == 0] == 0).all()
    # In range: both ends are within one step of a level.
    slack = 1e-5 * float(x.abs().max())
    assert ((value - x).abs() <= float(scale) + slack).all()
    below, above = float(code.round()), 2**bits - 1 - float(code.round())
    assert float(x.max()) <= above * float(scale) + slack
    assert float(-x.min()) <= below * float(scale) + slack


def test_variance_is_that_of_stochastic_rounding() -> None:
    """Of the per-tensor and the per-row quantizer, given the matrix: ``s^2 a (1 - a)``."""
    x = rows_of_any_size(16, 64)
    for config in (PTQ, PSQ):
        module = quantizer(config)
        rounded = GradientQuantizer(module, "")
        _, scale, zero_point, _ = module(x)
        expected = (scale.double()**2 * rounding_variance(x.double() / scale + zero_point)).sum()
        draws = 300
        measured = sum(
            float((rounded(x, seed).double() - x).square().sum()) for seed in range(draws)) / draws
        assert measured == pytest.approx(float(expected), rel=0.05)


def test_one_bit_has_no_zero_between_levels() -> None:
    with pytest.raises(ValueError, match="bit_width must be 2 or more, got 1"):
        quantizer(PTQ, bit_width=1)


def test_bfloat16_metadata_would_move_zero() -> None:
    with pytest.raises(ValueError, match="move zero off the grid"):
        quantizer(PTQ, metadata_dtype=torch.bfloat16)


@pytest.mark.parametrize("config", [PSQ, BHQ, PER_CHANNEL], ids=lambda c: c.__name__)
def test_saved_tensors_are_not_stored_as_rows(config: Any) -> None:
    with pytest.raises(UnsupportedQuantizerError):
        codec_from(config)


def test_channels_need_a_second_dimension() -> None:
    with pytest.raises(IndexError, match="row_dim=2 needs a tensor with that dimension"):
        quantizer(PER_CHANNEL, row_dim=2)(torch.zeros(3, 4))


@each_kind
def test_gradient_passes_straight_through(config: Any) -> None:
    x = rows_of_any_size(6, 32).requires_grad_()
    value = quantizer(config)(x)[0]
    torch.manual_seed(0)
    cotangent = torch.randn_like(x)
    gradient, = torch.autograd.grad(value, x, cotangent)
    # Scales and offsets follow the ends of a range, so only most elements get it unchanged.
    assert float((gradient - cotangent).abs().median()) < 0.05
