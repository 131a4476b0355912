"""Subtractive dither: the error is uniform within half a step, whatever the value is."""

import pytest
import torch
from torch import Tensor

from brevitas_bp.core.rounding import DitheredRound
from brevitas_bp.format.random import seeded
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import DITHERED, MAX, MIN_MAX, NARROW, STOCHASTIC, UNSIGNED, Rounding
from brevitas_bp.kernels import dispatch
from tests.stats import bernstein, hoeffding, normal, rounding_variance
from tests.strategies import RULES, dtype_name, normals
from tests.support import stage_name

COPIES, SIZE = 1 << 12, 64
#: A bucket whose ends are those of the grid: fractions of a step, and grid points themselves.
POSITIONS = torch.linspace(0, 3, SIZE)
each_rule = pytest.mark.parametrize(("rule", "code_range"), RULES, ids=stage_name)
# The noise is a multiple of 2**-24, and so is the error of float32 arithmetic on a few steps.
SLACK = 2.0**-18


def errors(spec: BucketQuantSpec, values: Tensor = POSITIONS, seed: int = 1) -> Tensor:
    """Returns the errors of copies of one bucket [COPIES, SIZE], in steps."""
    flat = values.repeat(COPIES)
    encoded = dispatch.encode(flat, spec, seed)
    decoded = dispatch.decode(encoded, spec, seed, flat.numel(), flat.dtype)
    return (decoded.double() - flat).view(COPIES, -1) / encoded.scale.double().unsqueeze(-1)


def distance_from_uniform(sample: Tensor) -> float:
    """Returns the largest difference between the distribution of a sample and that of U(-1/2, 1/2)."""
    ordered = sample.flatten().sort().values
    n = len(ordered)
    above = torch.arange(1, n + 1) / n - (ordered + 0.5)
    return float(torch.maximum(above, 1 / n - above).max())


def dithered(width: int = 2, **changes: object) -> BucketQuantSpec:
    return BucketQuantSpec(width, SIZE, rounding=DITHERED, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8])
def test_the_error_is_uniform_within_half_a_step(width: int) -> None:
    found = errors(dithered(width))
    slack = SLACK * 2**width
    assert found.abs().max() <= 0.5 + slack
    # The Dvoretzky-Kiefer-Wolfowitz inequality (Massart, 1990) has the constants of Hoeffding's.
    assert distance_from_uniform(found) < hoeffding(found.numel()) + slack


def test_the_error_of_stochastic_rounding_is_not_uniform() -> None:
    # Positive control.
    found = errors(BucketQuantSpec(2, SIZE))
    assert found.abs().max() > 0.6
    assert distance_from_uniform(found) > 10 * hoeffding(found.numel())


@pytest.mark.parametrize("metadata_dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@each_rule
@pytest.mark.parametrize("width", [2, 4, 8])
def test_each_value_has_a_uniform_error_of_its_own(
        width: int, rule: object, code_range: object, metadata_dtype: torch.dtype) -> None:
    values = normals((SIZE,), 1).float() * 3 + 1
    found = errors(dithered(
        width, scale_rule=rule, code_range=code_range, metadata_dtype=metadata_dtype), values)
    slack = SLACK * 2**width
    # A uniform error is strictly sub-Gaussian, so the limit of normals holds for any number of copies.
    mean_limit = normal(SIZE) * (1 / 12 / COPIES)**0.5
    assert (found.mean(0).abs() < mean_limit + slack).all()
    # Squares lie between 0 and 1/4.
    variance = found.square().mean(0)
    assert ((variance - 1 / 12).abs() < hoeffding(COPIES, SIZE) / 4 + slack).all()
    assert all(distance_from_uniform(e) < hoeffding(COPIES, SIZE) + slack for e in found.T)


def test_the_variance_is_half_of_that_of_stochastic_rounding() -> None:
    plain, own = errors(BucketQuantSpec(2, SIZE)), errors(dithered())
    limit = hoeffding(COPIES, SIZE)
    expected = rounding_variance(POSITIONS.double())
    assert ((plain.square().mean(0) - expected).abs() < limit + SLACK).all()
    assert ((own.square().mean(0) - 1 / 12).abs() < limit / 4 + SLACK).all()
    # a (1 - a) is 1/6 on average, and 1/4 in the middle of a step.
    assert float(expected.mean()) == pytest.approx(1 / 6, rel=0.05)
    assert float(expected.max()) == pytest.approx(1 / 4, rel=0.01)


def test_values_on_the_grid_are_better_off_with_stochastic_rounding() -> None:
    grid = torch.arange(4.0).repeat(SIZE // 4)
    assert errors(BucketQuantSpec(2, SIZE), grid).abs().max() < SLACK
    assert errors(dithered(), grid).abs().max() > 0.49


def test_constant_buckets_are_exact() -> None:
    for value in (0.0, 3.7, -1e-30, 2e38):
        x = torch.full((SIZE,), value)
        encoded = dispatch.encode(x, dithered(), 1)
        assert torch.equal(dispatch.decode(encoded, dithered(), 1, SIZE, x.dtype), x)


def test_errors_of_different_elements_are_uncorrelated() -> None:
    found = errors(dithered())
    # Products lie between -1/4 and 1/4.
    products = found.T @ found / COPIES
    products.fill_diagonal_(0)
    assert products.abs().max() < hoeffding(COPIES, SIZE * SIZE) / 2


def test_decoding_with_other_noise_triples_the_variance() -> None:
    # Positive control: the seed is needed. Codes alone have a (1 - a), the other noise adds 1/12.
    flat = POSITIONS.repeat(COPIES)
    encoded = dispatch.encode(flat, dithered(), 1)
    decoded = dispatch.decode(encoded, dithered(), 2, flat.numel(), flat.dtype)
    found = (decoded - flat).double()
    assert found.abs().max() > 0.9
    assert float(found.square().mean()) == pytest.approx(1 / 4, rel=0.02)


def test_the_largest_noise_gives_no_code_above_the_top() -> None:
    # Noise just below 1 and a value at the end of the range: the code is the top code.
    top = 3.0
    noise = torch.tensor([0.0, 1 - 2.0**-24])
    u = torch.tensor([top, top])
    codes = DITHERED.round_(u.clone(), noise, 3)
    assert codes[0] == top and codes[1].clamp(0, top) == top
    assert (DITHERED.restore(codes.clamp(0, top), noise.clone(), 3) - u).abs().max() <= 0.5
    assert DITHERED.round_(torch.zeros(2), noise, 3).tolist() == [0, 0]


@pytest.mark.parametrize("rounding", [DITHERED, STOCHASTIC], ids=stage_name)
def test_both_roundings_are_unbiased(rounding: Rounding) -> None:
    for rule, code_range in ((MIN_MAX, UNSIGNED), (MAX, NARROW)):
        spec = BucketQuantSpec(3, SIZE, rule, code_range, rounding)
        found = errors(spec, normals((SIZE,), 2).float())
        # Errors lie within a step, with a variance of at most 1/4.
        assert (found.mean(0).abs() < bernstein(0.25, COPIES, SIZE) + SLACK).all()


# The module.


def test_the_module_is_the_row() -> None:
    rounding, u = DitheredRound(), normals((1000,), 1).float()
    with seeded(3):
        noise = rounding.draw(u)
    codes = rounding(u, noise)
    assert torch.equal(codes, DITHERED.round_(u.clone(), noise, 3))
    assert torch.equal(
        rounding.restore(codes, noise), DITHERED.restore(codes.clone(), noise, 3))
    assert rounding.bucket_stage("float_to_int_impl") is DITHERED
    assert rounding.bucket_stage("another_slot") is None


def test_the_gradient_of_the_module_is_straight_through() -> None:
    u = normals((100,), 1).float().requires_grad_()
    rounding, weights = DitheredRound(), torch.arange(100.0)
    noise = rounding.draw(u)
    (rounding.restore(rounding(u, noise), noise) * weights).sum().backward()
    assert u.grad is not None and torch.equal(u.grad, weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=dtype_name)
def test_the_noise_of_the_module_is_float32(dtype: torch.dtype) -> None:
    u = normals((100,), 1).to(dtype)
    noise = DitheredRound().draw(u)
    assert noise.dtype == torch.float32 and noise.shape == u.shape
    assert DitheredRound()(u, noise).dtype == dtype


def test_two_draws_differ_and_the_generator_governs_them() -> None:
    rounding, u = DitheredRound(), torch.zeros(1000)
    torch.manual_seed(1)
    first, second = rounding.draw(u), rounding.draw(u)
    torch.manual_seed(1)
    assert torch.equal(rounding.draw(u), first) and not torch.equal(first, second)
