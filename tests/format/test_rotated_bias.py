"""Errors of rotated codes: their energy, and that their mean is zero."""

import math

import pytest
import torch
from torch import Tensor

from brevitas_bp.format import stages
from brevitas_bp.format.random import noise_keys, words_
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import DITHERED, ROTATED, ROTATED_TWICE, UNBIASED
from brevitas_bp.kernels import dispatch
from tests.format.rotated import (
    DATA,
    ENERGY,
    HARD,
    SIZE,
    errors_of,
    levels_spec,
    relative_energy,
    squared_bias,
    strict_spec,
)
from tests.stats import ALPHA, hoeffding, normal
from tests.strategies import normals

DRAWS = 10_000
#: What is promised about the error over the energy about the mean.
PROMISED = {1: 0.58, 2: 0.135, 3: 0.036, 4: 0.0096}
#: Relative bias that is promised for any bucket.
BIAS = {1: 0.004, 2: 0.002, 3: 0.002, 4: 0.002}
each_width = pytest.mark.parametrize("width", PROMISED)
each_hard = pytest.mark.parametrize("name", HARD)


# The energy of the error.


@each_width
@pytest.mark.parametrize("name", DATA)
def test_the_energy_of_the_error_is_as_promised_for_any_data(name: str, width: int) -> None:
    x = DATA[name]((1000, SIZE), 1)
    measured = float(relative_energy(x, levels_spec(width)))
    # Not below the limit for large buckets either, by more than the padding-free size explains.
    assert 0.95 * ENERGY[width] < measured <= PROMISED[width]


@each_width
@each_hard
def test_the_energy_of_the_error_is_as_promised_for_hard_buckets(name: str, width: int) -> None:
    energy = errors_of(HARD[name], levels_spec(width), DRAWS // 5).square().sum(-1)
    assert float(energy.mean()) <= PROMISED[width]
    # It hardly depends on the draw.
    assert float(energy.std()) < 0.35 * PROMISED[width]


@each_width
def test_min_max_rounding_has_much_larger_errors(width: int) -> None:
    # Positive control.
    x = DATA["outlier"]((1000, SIZE), 1)
    assert relative_energy(x, BucketQuantSpec(width)) > 10 * PROMISED[width]
    # So have levels without a rotation.
    assert relative_energy(x, levels_spec(width, stages.NO_TRANSFORM)) > 7 * PROMISED[width]


#: Measured in the specification: data -> (width, stochastic, dithered, rotated), over the whole energy.
WHOLE_ENERGY = {
    "relu": ((2, 0.151, 0.154, 0.090), (4, 0.0061, 0.0062, 0.0064)),
    "silu": ((2, 0.36, 0.23, 0.115), (4, 0.0168, 0.0094, 0.0081)),
    "shifted": ((2, 0.061, 0.031, 0.013), (4, 0.0024, 0.0012, 0.0010)),
    "silu's derivative": ((3, 0.0124, 0.0065, 0.0122), (4, 0.0027, 0.0014, 0.0032))}


@pytest.mark.parametrize("name", WHOLE_ENERGY)
def test_the_code_with_the_least_error_depends_on_the_data(name: str) -> None:
    x = DATA[name]((1000, SIZE), 1)
    for width, *expected in WHOLE_ENERGY[name]:
        specs = (BucketQuantSpec(width), BucketQuantSpec(width, rounding=DITHERED), levels_spec(width))
        measured = [float(relative_energy(x, spec, about_mean=False)) for spec in specs]
        # Half of the last digit that is printed, and what another sample changes.
        assert measured == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize(("size", "energy"), [(16, 0.105), (64, 0.126), (1024, 0.132)])
def test_smaller_buckets_have_smaller_errors(size: int, energy: float) -> None:
    x = normals((1 << 19,), 1).float().view(-1, size)
    # A bucket's mean, which costs nothing, has 1 / size of the energy here.
    measured = float(relative_energy(x, levels_spec(2, size=size), about_mean=False))
    assert measured == pytest.approx(energy, rel=0.01)


@each_width
def test_the_decoded_bucket_has_the_length_of_the_values_along_them(width: int) -> None:
    for name, bucket in HARD.items():
        errors = errors_of(bucket, levels_spec(width), 50)
        centred = bucket.double() - bucket.double().mean()
        along = errors @ centred / centred.norm()
        # <x~ - m, x - m> = |x - m|**2 up to float32.
        assert along.abs().max() < 1e-5, name


# The mean of the error: levels.


def resolution(width: int, bias: float, draws: int) -> float:
    """Returns by how much :func:`squared_bias` may exceed the square of ``bias``.

    Errors are orthogonal to the bucket and spread evenly over ``n = SIZE - 1`` directions, with the
    energy ``d = D / (1 - D)``. So ``draws / d * n * |mean|**2`` is a chi-square variable (Laurent and
    Massart, 2000), and the product of the mean with a bias is normal.
    """
    n, t = SIZE - 1, math.log(1 / ALPHA)
    variance = ENERGY[width] / (draws * n)
    return variance * (2 * math.sqrt(n * t) + 2 * t) + 2 * bias * math.sqrt(variance) * normal()


@each_width
@each_hard
def test_two_rotations_leave_no_bias(name: str, width: int) -> None:
    errors = errors_of(HARD[name], levels_spec(width), DRAWS)
    limit = BIAS[width]**2 + resolution(width, BIAS[width], DRAWS)
    assert squared_bias(errors) < limit


@pytest.mark.parametrize(("name", "biases"), [
    ("e1 + 0.3 e2", {1: 0.31, 2: 0.22, 4: 0.042}),
    ("e1 + 0.9 e2", {1: 0.58, 2: 0.12, 4: 0.025}),
    ("outlier", {1: 0.36})])
def test_one_rotation_leaves_the_bias_of_the_specification(
        name: str, biases: dict[int, float]) -> None:
    # Positive control.
    for width, bias in biases.items():
        found = squared_bias(errors_of(HARD[name], levels_spec(width, ROTATED), DRAWS))
        assert math.sqrt(found) == pytest.approx(bias, rel=0.1)
        assert found > 10 * (BIAS[width]**2 + resolution(width, BIAS[width], DRAWS))


def test_constant_signs_leave_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    # Positive control: without random signs, every draw has the same error.
    def constant(buckets: Tensor, size: int, seed: int) -> Tensor:
        return torch.zeros((len(buckets), size // 16), dtype=torch.int32)

    monkeypatch.setattr(stages, "sign_words", constant)
    with dispatch.use("reference"):
        errors = errors_of(HARD["student"], levels_spec(1), 200)
    assert math.sqrt(squared_bias(errors)) > 0.3


def test_signs_of_one_encode_for_all_buckets_leave_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    # Positive control: buckets of one tensor must not share their signs.
    right = stages.sign_words

    def shared(buckets: Tensor, size: int, seed: int) -> Tensor:
        return right(buckets * 0, size, seed)

    monkeypatch.setattr(stages, "sign_words", shared)
    with dispatch.use("reference"):
        errors = errors_of(HARD["student"], levels_spec(1), 200)
    assert math.sqrt(squared_bias(errors)) > 0.3


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("name", ["student", "sine", "normal"])
def test_no_element_has_a_mean_beyond_its_theoretical_deviation(name: str, width: int) -> None:
    bucket = DATA["normal"]((SIZE,), 9) if name == "normal" else HARD[name]
    errors = errors_of(bucket, levels_spec(width), DRAWS)
    # Energy is spread evenly over all directions but that of the bucket.
    deviation = math.sqrt(ENERGY[width] / (SIZE - 1) / DRAWS)
    # A bias of all elements together, as promised, and float32.
    assert errors.mean(0).abs().max() < normal(SIZE) * deviation + 1e-6
    assert errors.mean(0).norm() < math.sqrt(BIAS[width]**2 + 2 * SIZE * deviation**2)


def test_the_deviation_of_each_element_is_the_theoretical_one() -> None:
    errors = errors_of(HARD["student"], levels_spec(2), DRAWS)
    variance = errors.square().mean(0) * (SIZE - 1) / ENERGY[2]
    along = HARD["student"].double() - HARD["student"].double().mean()
    # The direction of the bucket has no error.
    expected = 1 - (along / along.norm()).square()
    # A sample variance has a relative deviation of sqrt(2 / n). Buckets of 256 have 1 % less energy.
    assert (variance - expected).abs().max() < normal(SIZE) * math.sqrt(2 / DRAWS) + 0.02


# The mean of the error: strict mode.


class Strict:
    """Errors of copies of a bucket, rotated once and dithered, in units of their theoretical deviation.

    Given the signs, an error is a sum of independent uniform variables. Uniform variables have lighter
    tails than normal variables of their variance (they are strictly sub-Gaussian), so the limit of
    ``normal`` holds for every number of draws.
    """

    def __init__(self, bucket: Tensor, spec: BucketQuantSpec, draws: int = DRAWS) -> None:
        assert spec.bucket_size is not None
        flat = bucket.expand(draws, -1).reshape(-1)
        encoded = dispatch.encode(flat, spec, 4)
        decoded = dispatch.decode(encoded, spec, 4, flat.numel(), flat.dtype)
        self.errors = decoded.view(draws, -1).double() - bucket.double()
        # Rotating back adds B values with the variance of a step.
        self.variance = encoded.scale.double().square() * spec.bucket_size / 12
        self.slack = 1e-6 * float(bucket.double().norm())

    def z(self) -> Tensor:
        """Returns the mean error of each element over its deviation, less what float32 may add."""
        n = len(self.errors)
        deviation = self.variance.sum().sqrt() / n
        # A bucket that a rotation makes constant has no error at all.
        return (self.errors.mean(0).abs() - self.slack).clamp(min=0) / deviation.clamp(min=1e-30)


@each_hard
@pytest.mark.parametrize("width", [1, 2, 4])
def test_strict_mode_is_unbiased_for_every_bucket(name: str, width: int) -> None:
    assert Strict(HARD[name], strict_spec(width)).z().max() < normal(SIZE)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_strict_mode_has_the_variance_of_dither(width: int) -> None:
    strict = Strict(HARD["outlier"], strict_spec(width), 1000)
    n = strict.errors.numel()
    # A rotated error lies within half a step, so its square lies between 0 and a quarter.
    measured = strict.errors.square().sum(-1) / (12 * strict.variance)
    assert abs(float(measured.mean()) - SIZE / 12) / SIZE < hoeffding(n) / 4 + 1e-5


def test_the_energy_of_strict_mode_is_that_of_the_specification() -> None:
    energies = {
        name: float(relative_energy(DATA[name]((1000, SIZE), 1), strict_spec(2))) for name in DATA}
    assert energies["normal"] == pytest.approx(0.30, rel=0.02)
    # After one rotation, outliers are a few large values of one size, which lie on the grid's ends.
    assert energies["outlier"] < energies["student"] < 0.30
    # It keeps the mean, so data with a large mean are better off with the levels.
    assert energies["shifted"] > 2


@pytest.mark.parametrize("wrong", [0.02, -0.02])
def test_dither_that_is_not_uniform_would_be_noticed(
        wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Positive control: decoding subtracts other noise than encoding added, by a fiftieth of a step.
    restore = DITHERED.restore
    object.__setattr__(DITHERED, "restore", lambda q, noise, top: restore(q, noise + wrong, top))
    try:
        with dispatch.use("reference"):
            z = Strict(HARD["student"], BucketQuantSpec(2, SIZE, rounding=DITHERED), 1000)
    finally:
        object.__setattr__(DITHERED, "restore", restore)
    deviation = (z.variance.sum() / SIZE).sqrt() / 1000
    assert (z.errors.mean(0).abs() / deviation).max() < normal(SIZE)
    # All elements together are off in one direction.
    assert abs(z.errors.mean()) > normal() * deviation / math.sqrt(SIZE)


# Scales in bfloat16.


def scales_of(spec: BucketQuantSpec, x: Tensor) -> Tensor:
    return dispatch.encode(x.reshape(-1), spec, 6).scale.double()


@pytest.mark.parametrize("width", [1, 3])
def test_bfloat16_scales_are_rounded_without_bias(width: int) -> None:
    spec = BucketQuantSpec(
        width, 16, UNBIASED, stages.NORMAL, stages.NEAREST, transform=ROTATED_TWICE)
    x = normals((20_000, 16), 2).float()
    exact = scales_of(spec, x)
    stored = scales_of(BucketQuantSpec(**{**vars(spec), "metadata_dtype": torch.bfloat16}), x)
    spacing = 2.0**(exact.log2().floor() - 7)
    steps = (stored - exact) / spacing
    assert steps.abs().max() < 1 and (stored == stored.bfloat16().double()).all()
    # The random words have 16 bits; a difference of 2**-17 of a step is left.
    assert abs(steps.mean()) < hoeffding(len(steps)) + 2.0**-16


def test_one_scale_is_rounded_up_with_the_probability_of_its_fraction() -> None:
    from brevitas_bp.format.arithmetic import to_random

    count = 100_000
    words = words_(torch.arange(count, dtype=torch.int32).unsqueeze(-1), noise_keys(1, 3))
    for fraction in (0.0, 0.1, 0.5, 0.9):
        x = torch.full((count, 1), 1 + fraction * 2.0**-7)
        up = (to_random(x, torch.bfloat16, words) == 1 + 2.0**-7).double().mean()
        assert abs(float(up) - fraction) < hoeffding(count) + 2.0**-16
    # Positive control: rounding to nearest.
    assert float(torch.tensor(1 + 0.1 * 2.0**-7).bfloat16()) == 1
