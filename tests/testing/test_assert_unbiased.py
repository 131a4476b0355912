"""``assert_unbiased``: right subjects pass, biased ones fail, and too few draws are refused."""

import math
from typing import Any

import pytest
import torch
from brevitas.nn import QuantIdentity
from torch import Tensor, nn

from brevitas_bp import StochasticRound, codec_from, quant, seeded
from brevitas_bp.codec import Copy
from brevitas_bp.core.rounding import DitheredRound
from brevitas_bp.format.random import uniform
from brevitas_bp.testing import assert_unbiased
from tests.stats import empirical_bernstein
from tests.strategies import DTYPES, dtype_name, normals

Stochastic2 = quant.ShiftedUint2DynamicActPerBucketFloatStochastic
Nearest2 = quant.ShiftedUint2DynamicActPerBucketFloat
VALUES = normals((64,), 1).float()
POSITIONS = torch.linspace(0, 3, 31)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("rounding", [StochasticRound(), DitheredRound()])
def test_roundings(rounding: nn.Module, dtype: torch.dtype) -> None:
    if isinstance(rounding, DitheredRound) and dtype.itemsize == 2:
        dtype = torch.float64  # Sums with 16-bit noise are themselves rounded.
    bias = assert_unbiased(rounding, POSITIONS.to(dtype), draws=1 << 14, copies=64)
    assert bias.visible < 0.1 and bias.draws == 1 << 14


class Shifted(nn.Module):
    """Rounds up a little too often."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, u: Tensor) -> Tensor:
        noise = torch.ops.brevitas_bp.noise_like(u)
        return u.floor() + (noise < u - u.floor() + self.shift).to(u.dtype)


@pytest.mark.parametrize("shift", [0.1, 0.02])
def test_a_bias_of_the_size_that_it_says_is_seen(shift: float) -> None:
    with pytest.raises(AssertionError, match="rounding is biased"):
        assert_unbiased(Shifted(shift), POSITIONS + 0.05, draws=1 << 16, copies=1 << 8)
    visible = assert_unbiased(Shifted(0), POSITIONS, draws=1 << 16, copies=1 << 8).visible
    assert visible < 0.06


@pytest.mark.parametrize("config", [
    Stochastic2, quant.ShiftedUint8DynamicActPerBucketFloatStochastic,
    quant.Int4DynamicActPerBucketFloatStochastic, quant.ShiftedUint4DynamicActPerBucketFloatDithered])
def test_a_config_a_codec_a_module_and_a_layer(config: Any) -> None:
    codec = codec_from(config, bucket_size=64)
    (module,) = codec.quantizers()
    layer = QuantIdentity(config, return_quant_tensor=False, bucket_size=64)
    subjects: list[Any] = [codec, module, layer.act_quant, lambda x, seed: codec.encode(
        x, seed=seed).decode()]
    step = float(module(VALUES)[1].max())
    found = [assert_unbiased(
        subject, VALUES, draws=1 << 14, copies=256, largest_error=step) for subject in subjects]
    assert all(torch.equal(bias.mean, found[0].mean) for bias in found)
    # Copies of a bucket of 64 values; a config has buckets of 256.
    assert assert_unbiased(config, VALUES, draws=1 << 14, copies=256).visible < found[0].error


def test_a_rotated_config_needs_more_draws_or_a_bound() -> None:
    config, x = quant.RotatedNormal4DynamicActPerBucketFloat, normals((256,), 2).float()
    with pytest.raises(ValueError, match=r"take draws=\d+, or a smaller bound than largest_error="):
        assert_unbiased(config, x, draws=1024, copies=256)
    bias = assert_unbiased(config, x, draws=1 << 14, copies=256, largest_error=1.0)
    assert "would be seen" in str(bias)


@pytest.mark.parametrize("subject", [
    Nearest2, quant.ShiftedUint2Avg2DynamicActPerBucketFloatStochastic])
def test_biased_configs(subject: Any) -> None:
    with pytest.raises(AssertionError, match=r"is biased"):
        assert_unbiased(subject, VALUES, draws=2048, copies=256)


def test_a_seed_that_is_not_used_is_hinted_at() -> None:
    with pytest.raises(AssertionError, match=r"all draws are alike, so it rounds to nearest"):
        assert_unbiased(lambda x, seed: (x + uniform(0, tuple(x.shape))).floor(), POSITIONS)


def test_a_code_that_is_no_neighbour() -> None:
    class Wide(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            noise = torch.ops.brevitas_bp.noise_like(u)
            return (u + 3 * noise - 1).floor()

    with pytest.raises(AssertionError, match="one of the two integers next to each value"):
        assert_unbiased(Wide(), POSITIONS)


def test_clipping_is_named() -> None:
    with pytest.raises(AssertionError, match=r"errors of at most 0.5, got 1.*the subject clips"):
        assert_unbiased(lambda x, seed: x.clamp(max=2), POSITIONS, largest_error=0.5)


def test_the_mean_of_all_elements_sees_less_than_that_of_each() -> None:
    def shifted(x: Tensor, seed: int) -> Tensor:
        return x + 0.006 + 0.5 * (uniform(seed, tuple(x.shape)) - 0.5)

    x = torch.zeros(256)
    with pytest.raises(AssertionError, match="a mean error of all elements"):
        assert_unbiased(shifted, x, largest_error=0.3, draws=1 << 14, copies=64)


def test_power() -> None:
    with pytest.raises(ValueError, match=r"100 draws see a bias of .*expected to see detects=.*take"):
        assert_unbiased(StochasticRound(), POSITIONS, draws=100)
    with pytest.raises(ValueError, match="take draws=") as caught:
        assert_unbiased(StochasticRound(), POSITIONS, detects=0.05)
    draws = int(str(caught.value).partition("take draws=")[2].partition(",")[0])
    bias = assert_unbiased(StochasticRound(), POSITIONS, detects=0.05, draws=draws, copies=64)
    assert 0.04 < bias.visible <= 0.05


def test_nothing_to_round() -> None:
    with pytest.raises(ValueError, match="every draw gave the value itself"):
        assert_unbiased(StochasticRound(), torch.arange(4.0))
    assert assert_unbiased(Copy(), VALUES, draws=8).error == 0


@pytest.mark.parametrize(("settings", "told"), [
    ({"values": torch.arange(3)}, "a float tensor with elements, got torch.int64"),
    ({"values": torch.empty(0)}, "with elements"), ({"values": torch.tensor([math.nan])}, "finite"),
    ({"draws": 1}, "draws must be >= 2"), ({"draws": 10, "copies": 3}, "a multiple of copies"),
    ({"detects": 0.0}, "detects must be > 0"),
    ({"largest_error": math.inf}, "largest_error must be > 0")])
def test_arguments_that_make_no_sense(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        assert_unbiased(**{"subject": StochasticRound(), "values": POSITIONS, **settings})


@pytest.mark.parametrize("subject", [StochasticRound, 3, None, lambda x: x])
def test_subjects_that_are_none(subject: Any) -> None:
    with pytest.raises(TypeError, match="expected a Brevitas config, a module, a codec, or a function"):
        assert_unbiased(subject, POSITIONS)


def test_results_that_are_no_numbers() -> None:
    with pytest.raises(AssertionError, match="expected finite results"):
        assert_unbiased(lambda x, seed: x * math.nan, POSITIONS)
    with pytest.raises(AssertionError, match=r"expected the shape \[31\], got \[1\]"):
        assert_unbiased(lambda x, seed: x[:1], POSITIONS)


def test_generators_are_afterwards_as_they_were() -> None:
    state = torch.get_rng_state()
    assert_unbiased(lambda x, seed: (x + torch.rand_like(x)).floor(), POSITIONS, detects=0.5)
    with seeded(1):
        expected = torch.ops.brevitas_bp.noise_like(POSITIONS)
    with seeded(1):
        assert_unbiased(StochasticRound(), POSITIONS)
        assert torch.equal(torch.ops.brevitas_bp.noise_like(POSITIONS), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_empirical_bound_holds_where_a_normal_limit_does_not() -> None:
    # Draws that are almost always 0: the bound covers the mean that they have not shown yet.
    draws = torch.zeros(1000)
    assert float(empirical_bernstein(draws.var(), 1000)) > 0.04
    with pytest.raises(ValueError, match="n must be >= 2"):
        empirical_bernstein(0.0, 1)
