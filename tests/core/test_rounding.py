"""Stochastic rounding, compared with Brevitas' own."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from brevitas.core.function_wrapper.stochastic_round import StochasticRoundSte
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from brevitas_bp.core.rounding import StochasticRound
from brevitas_bp.format import random
from brevitas_bp.format.random import seeded, uniform
from tests.stats import bernstein, rounding_variance
from tests.strategies import DTYPES, dtype_name

Rounding = Callable[[Tensor], Tensor]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

# Positions that a biased rounder gets wrong: near the ends, the middle, both signs.
POSITIONS = torch.tensor([
    -2.999, -1.75, -0.5, -0.001, 0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0, 7.3])
DRAWS = 200_000


def is_unbiased(rounding: Rounding, positions: Tensor = POSITIONS) -> bool:
    """Whether the mean of ``DRAWS`` roundings equals each position, within its tolerance.

    The tolerance comes from the theoretical variance ``a (1 - a)``. 2**-24 is the resolution of the
    noise, and 2**-20 covers the float32 error of a position of size 8.
    """
    mean = rounding(positions.expand(DRAWS, -1)).double().mean(0)
    variance = rounding_variance(positions.double())
    tolerance = bernstein(variance, DRAWS, tests=len(positions)) + 2.0**-24 + 2.0**-20
    return bool(((mean - positions.double()).abs() < tolerance).all())


def floor_of_bfloat16_noise(x: Tensor) -> Tensor:
    """The most common wrong rounder: noise in 16 bits."""
    noise = torch.rand(x.shape, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    return (x + noise).floor()


def two_percent_high(x: Tensor) -> Tensor:
    """A rounder that rounds up 2 % too often."""
    fraction = x - x.floor()
    return x.floor() + (uniform(0, tuple(x.shape)) < fraction * 1.02).to(x.dtype)


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_is_the_position(seed: int) -> None:
    with seeded(seed):
        assert is_unbiased(StochasticRound())


@pytest.mark.parametrize(
    "wrong", [torch.round, torch.floor, floor_of_bfloat16_noise, two_percent_high])
def test_a_biased_rounder_fails(wrong: Rounding) -> None:
    # Positive controls.
    assert not is_unbiased(wrong)


def test_sixteen_bit_input_is_rounded_without_bias() -> None:
    # 1.0078125 and the like are exact in bfloat16. The noise must not be bfloat16.
    positions = torch.tensor([2.0**-7, 2.0**-9, 0.5, 1 + 2.0**-7], dtype=torch.bfloat16)
    with seeded(1):
        assert is_unbiased(StochasticRound(), positions)


@each_dtype
def test_integers_are_fixed_points(dtype: torch.dtype) -> None:
    integers = torch.arange(-128, 129).to(dtype)
    for seed in range(20):
        with seeded(seed):
            assert torch.equal(StochasticRound()(integers), integers)


def test_the_smallest_draw_does_not_move_an_integer(monkeypatch: pytest.MonkeyPatch) -> None:
    # Noise of exactly zero occurs once in 2**24 draws.
    monkeypatch.setattr(random, "uniform_", lambda index, keys: torch.zeros(index.shape))
    x = torch.tensor([-1.0, 0.0, 2.0, 0.001])
    assert StochasticRound()(x).tolist() == [-1, 0, 2, 1]


@each_dtype
def test_a_result_is_one_of_the_two_neighbours(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 1001).to(dtype)
    rounded = StochasticRound()(x)
    assert rounded.dtype == dtype
    assert ((rounded == x.floor()) | (rounded == x.ceil())).all()


def test_nan_and_inf_pass_through() -> None:
    x = torch.tensor([float("nan"), float("inf"), float("-inf")])
    torch.testing.assert_close(StochasticRound()(x), x, rtol=0, atol=0, equal_nan=True)


def test_the_gradient_is_straight_through() -> None:
    x = torch.linspace(-3, 3, 100, requires_grad=True)
    weights = torch.arange(100.0)
    (StochasticRound()(x) * weights).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weights)


def test_eval_does_not_change_rounding() -> None:
    rounding = StochasticRound().eval()
    with seeded(0):
        assert is_unbiased(rounding)


def test_deterministic_inference_rounds_to_nearest_in_eval_only() -> None:
    rounding, x = StochasticRound(deterministic_inference=True), torch.linspace(-3, 3, 1001)
    assert not torch.equal(rounding(x), x.round())
    assert torch.equal(rounding.eval()(x), x.round())


def shares_draws(first: Rounding, second: Rounding) -> bool:
    x = torch.full((1000,), 0.5)
    return torch.equal(first(x), second(x))


def test_two_modules_draw_independently() -> None:
    assert not shares_draws(StochasticRound(), StochasticRound())


def test_two_stock_modules_share_their_draws() -> None:
    # Positive control: why StochasticRound exists.
    assert shares_draws(StochasticRoundSte(), StochasticRoundSte())


def test_torch_manual_seed_governs_the_draws() -> None:
    x, rounding = torch.full((1000,), 0.5), StochasticRound()
    torch.manual_seed(3)
    first = rounding(x)
    torch.manual_seed(3)
    assert torch.equal(rounding(x), first) and not torch.equal(rounding(x), first)


def forward_and_recompute(rounding: Rounding) -> list[Tensor]:
    """Returns a rounding's results in a checkpointed forward pass and in its recomputation."""
    seen: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        y = rounding(x)
        seen.append(y.detach())
        return y * x

    x = torch.full((1000,), 0.5, requires_grad=True)
    checkpoint(function, x, use_reentrant=False).sum().backward()
    return seen


def test_a_checkpoint_recomputes_the_same_draws() -> None:
    assert torch.equal(*forward_and_recompute(StochasticRound()))


def test_a_checkpoint_recomputes_other_draws_with_the_stock_module() -> None:
    # Positive control.
    assert not torch.equal(*forward_and_recompute(StochasticRoundSte()))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_rounds_independently(
        clone: Callable[[StochasticRound], StochasticRound]) -> None:
    rounding = StochasticRound(deterministic_inference=True)
    copied = clone(rounding)
    assert copied.deterministic_inference
    assert not shares_draws(rounding, copied)
