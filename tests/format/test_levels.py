"""The Lloyd-Max levels of the normal distribution."""

import itertools
import math

import pytest
import torch

from brevitas_bp.format.levels import level_of, levels, nearest_level, thresholds

each_width = pytest.mark.parametrize("width", range(1, 9))
#: D / (1 - D) of the levels, as printed in the literature to these digits.
RATIOS = {
    1: 0.5707963, 2: 0.1331212, 3: 0.0357840, 4: 0.0095921, 5: 0.002511, 6: 0.000645, 7: 0.000164,
    8: 0.000041}
# Half of the last digit that is printed.
DIGITS = {**dict.fromkeys(range(1, 5), 5e-8), **dict.fromkeys(range(5, 9), 5e-7)}
# Relative rounding error of a float32 constant.
EPS = 2.0**-24


def density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def mass_between(a: float, b: float) -> float:
    """The probability of ``0 <= a <= x <= b``; accurate in the tail."""
    return (math.erfc(a / math.sqrt(2)) - math.erfc(b / math.sqrt(2))) / 2


def borders(places: list[float]) -> list[float]:
    """Midpoints of the positive levels, between 0 and infinity."""
    return [0.0, *((a + b) / 2 for a, b in itertools.pairwise(places)), math.inf]


def means(places: list[float]) -> list[float]:
    """The mean of a normal variable between each pair of neighbouring borders."""
    ends = borders(places)
    return [(density(a) - density(b)) / mass_between(a, b) for a, b in itertools.pairwise(ends)]


def positive(width: int) -> list[float]:
    return list(levels(width)[2**(width - 1):])


@each_width
def test_each_level_is_the_mean_of_the_values_that_get_it(width: int) -> None:
    places = positive(width)
    # A level off by a relative EPS moves a mean by no more than that: the map is a contraction.
    assert means(places) == pytest.approx(places, rel=4 * EPS, abs=4 * EPS)


def test_a_level_off_by_a_ten_thousandth_would_be_noticed() -> None:
    # Positive control.
    places = positive(4)
    places[3] *= 1.0001
    assert means(places) != pytest.approx(places, rel=4 * EPS, abs=4 * EPS)


@each_width
def test_the_error_of_an_unbiased_scale_is_that_of_the_literature(width: int) -> None:
    places = positive(width)
    ends = borders(places)
    # Since levels are means, the energy of the error is 1 - E[level**2].
    energy = 2 * sum(q * q * mass_between(a, b) for q, a, b in zip(places, ends, ends[1:]))
    assert (1 - energy) / energy == pytest.approx(RATIOS[width], abs=DIGITS[width] + 8 * EPS)


@each_width
def test_levels_are_symmetric_and_ascend(width: int) -> None:
    places = levels(width)
    assert len(places) == 2**width and list(places) == sorted(set(places))
    assert [-q for q in reversed(places)] == list(places)


@each_width
def test_each_code_is_that_of_the_nearest_level(width: int) -> None:
    u = torch.linspace(-5, 5, 4001, dtype=torch.float64)
    table = torch.tensor(levels(width), dtype=torch.float64)
    distance = (u.unsqueeze(-1) - table).abs()
    codes = nearest_level(u, width)
    chosen = distance.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
    # Thresholds are float32 numbers, so either neighbour may be chosen within their rounding error.
    assert (chosen <= distance.amin(-1) + 4 * 8 * EPS).all()
    assert torch.equal(level_of(codes, width), table[codes.long()])


@each_width
def test_a_level_is_the_nearest_to_itself(width: int) -> None:
    codes = torch.arange(2.0**width)
    assert torch.equal(nearest_level(level_of(codes, width), width), codes)


@each_width
def test_a_threshold_belongs_to_the_larger_magnitude(width: int) -> None:
    half = 2**(width - 1)
    u = torch.tensor([0.0, *thresholds(width)])
    places = torch.arange(half).float()
    assert torch.equal(nearest_level(u, width), half + places)
    assert torch.equal(nearest_level(-u[1:], width), half - 1 - places[1:])
    # Zeros of either sign are positive, and so is NaN.
    assert nearest_level(torch.tensor([-0.0]), width) == half
    assert half <= nearest_level(torch.tensor([torch.nan]), width) < 2 * half
