"""Buckets that take the second width: a bijection, a fixed count, an exact probability."""

import math

import pytest
import torch
from torch import Tensor

from brevitas_bp.format.random import derive, unit_float
from brevitas_bp.format.widths import WidthLayout
from tests.stats import hoeffding

SIZES = (*range(71), 255, 256, 1000, 4097)
SEEDS = 4000


@pytest.mark.parametrize("per", ["bucket", "tensor"])
def test_slots_are_a_permutation(per: str) -> None:
    for n in SIZES:
        layout = WidthLayout.draw(n, 0.3, per, seed=n)
        assert layout.slots().sort().values.tolist() == list(range(n))


@pytest.mark.parametrize("per", ["bucket", "tensor"])
def test_buckets_inverts_slots(per: str) -> None:
    for n in SIZES:
        layout = WidthLayout.draw(n, 0.3, per, seed=n)
        assert torch.equal(layout.slots()[layout.buckets(0, n)], torch.arange(n))


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1 / 3, 0.9, 1.0])
def test_the_number_of_mixed_buckets_follows_from_the_seed(probability: float) -> None:
    for n in SIZES:
        layout = WidthLayout.draw(n, probability, "bucket", seed=n + 17)
        expected = min(n, math.floor(probability * n + unit_float(derive(n + 17, 0))))
        assert layout.mixed == expected == int(layout.is_mixed().sum())


def test_mixed_buckets_own_the_first_slots() -> None:
    layout = WidthLayout.draw(100, 0.3, "bucket", seed=0)
    mixed = torch.zeros(100, dtype=torch.bool)
    mixed[layout.buckets(0, layout.mixed)] = True
    assert torch.equal(mixed, layout.is_mixed())


@pytest.mark.parametrize("n", [1, 2, 3, 10, 97, 256])
def test_over_all_shifts_every_bucket_is_mixed_equally_often(n: int) -> None:
    # Exhaustive: under a uniform shift, each bucket is mixed with probability mixed / n exactly.
    drawn = WidthLayout.draw(n, 0.5, "bucket", seed=1)
    for mixed in (0, 1, n // 3, n):
        layouts = [
            WidthLayout(n, mixed, drawn.multiplier, drawn.inverse, shift) for shift in range(n)]
        times = torch.stack([layout.is_mixed() for layout in layouts]).sum(0)
        assert times.tolist() == [mixed] * n


def frequencies(n: int, probability: float, per: str) -> Tensor:
    """Returns how often each bucket is mixed, over ``SEEDS`` seeds."""
    layouts = [WidthLayout.draw(n, probability, per, derive(seed)) for seed in range(SEEDS)]
    return torch.stack([layout.is_mixed() for layout in layouts]).double().mean(0)


@pytest.mark.parametrize("per", ["bucket", "tensor"])
@pytest.mark.parametrize(("n", "probability"), [(7, 0.3), (33, 0.5), (10, 0.05)])
def test_every_bucket_is_mixed_with_the_probability(
        n: int, probability: float, per: str) -> None:
    deviation = (frequencies(n, probability, per) - probability).abs()
    assert deviation.max() < hoeffding(SEEDS, tests=n)


@pytest.mark.parametrize(("n", "probability"), [(7, 0.3), (33, 0.5), (10, 0.05)])
def test_the_mean_number_of_mixed_buckets_is_exact(n: int, probability: float) -> None:
    counts = [WidthLayout.draw(n, probability, "bucket", derive(s)).mixed for s in range(SEEDS)]
    # floor(x + U) lies within one of its mean x.
    assert abs(sum(counts) / SEEDS - probability * n) < hoeffding(SEEDS)


def test_the_mean_sees_a_count_that_is_rounded_down() -> None:
    # Positive control: floor(p n) without the draw.
    n, probability = 7, 0.3
    assert abs(math.floor(probability * n) - probability * n) > hoeffding(SEEDS)


def test_per_tensor_all_buckets_share_one_draw() -> None:
    counts = {WidthLayout.draw(10, 0.5, "tensor", derive(seed)).mixed for seed in range(100)}
    assert counts == {0, 10}


def test_mixed_buckets_are_spread_over_the_tensor() -> None:
    # The multiplier is near n times the golden section. So gaps have three lengths: two neighbouring
    # Fibonacci numbers and their sum. The longest is at most 2.62 (the ratio squared) shortest gaps.
    for n in (100, 1000, 4097):
        layout = WidthLayout.draw(n, 0.25, "bucket", seed=n)
        gaps = torch.diff(layout.is_mixed().nonzero().flatten())
        assert gaps.max() <= math.ceil(2.62 * n / layout.mixed)
