"""Few-bit tables equal the golden ones, and no other table is better."""

from collections.abc import Callable
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from brevitas_bp.activations.few_bit import (
    FewBitTable,
    few_bit_table,
    fit_few_bit_table,
    named_functions,
)
from brevitas_bp.activations.fitting import optimal_cuts
from brevitas_bp.activations.functions import ACTIVATIONS
from brevitas_bp.errors import UnknownNameError
from tests.activations.support import function_of_torch

# function, bits, borders, levels, squared error on [-10, 10]; printed digits.
GOLDEN: list[tuple[str, int, list[float], list[float], float]] = [
    ("gelu", 1, [0], [0, 1], 0.141047),
    ("gelu", 2, [-.469, 0, .469], [-.0157, .3195, .6805, 1.0157], 0.040563),
    ("gelu", 3, [-2.3981, -.7111, -.3263, 0, .3263, .7111, 2.3981],
     [-.0026, -.0888, .1252, .3721, .6279, .8748, 1.0888, 1.0026], 0.011898),
    ("gelu", 4, [-2.6851, -2.0531, -.9319, -.6835, -.4875, -.3153, -.155, 0, .155, .3153, .4875, .6835,
                 .9319, 2.0531, 2.6851], [], 0.003140),
    ("silu", 1, [0], [0, 1], 0.214978),
    ("silu", 2, [-.7893, 0, .7893], [-.0267, .3123, .6877, 1.0267], 0.047849),
    ("silu", 3, [-4.4863, -1.1379, -.5122, 0, .5122, 1.1379, 4.4863],
     [-.009, -.0676, .1347, .3747, .6253, .8653, 1.0676, 1.009], 0.017018),
    ("tanh", 3, [-1.6981, -1.0228, -.561, .5042, .8508, 1.2547, 1.9029],
     [.0078, .2431, .568, .9145, .6523, .3915, .1649, .0054], 0.025887),
    ("sigmoid", 1, [-3.1484], [.006, .0729], 0.096503)]

SMOOTH = sorted(name for name in named_functions() if not ACTIVATIONS[name].stepwise)
JUMPS = (-3.0, 0.0, 3.0)
EVEN = [name for name in SMOOTH if ACTIVATIONS[name].even]


def squared_error(
        function: Callable[[Tensor], Tensor], borders: list[float], levels: list[float],
        interval: tuple[float, float] = (-10, 10)) -> float:
    """Midpoint rule on cells that contain no border and no jump: an independent oracle."""
    inner = numbers(tuple(borders))
    ends = numbers((*interval, *borders, *JUMPS)).sort().values
    inside = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    x = ends[:-1, None] + inside * ends.diff()[:, None]
    level = numbers(tuple(levels))[torch.bucketize((ends[:-1] + ends[1:]) / 2, inner)]
    return float(((function(x) - level[:, None]).square().mean(1) * ends.diff()).sum())


def numbers(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("name", "bits", "borders", "levels", "error"), GOLDEN)
def test_golden_tables(
        name: str, bits: int, borders: list[float], levels: list[float], error: float) -> None:
    table = few_bit_table(name, bits)
    # Half a unit of the last digit printed.
    assert table.borders == pytest.approx(borders, abs=0.51e-4)
    assert not levels or table.levels == pytest.approx(levels, abs=0.51e-4)
    assert table.error == pytest.approx(error, abs=0.51e-6)
    assert table.bits == bits and not table.even


@pytest.mark.parametrize("name", SMOOTH)
def test_the_error_decreases_strictly_with_bits(name: str) -> None:
    errors = [few_bit_table(name, bits).error or 0 for bits in range(1, 7)]
    assert all(more < less for less, more in pairwise(errors))
    # With many intervals, doubling their number quarters the error.
    assert errors[4] / errors[5] == pytest.approx(4, rel=0.15)


def test_eight_bits_are_the_most() -> None:
    table = few_bit_table("gelu", 8)
    assert table.bits == 8 and len(table.levels) == 256
    assert (few_bit_table("gelu", 6).error or 0) / (table.error or 0) == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("name", SMOOTH)
def test_no_perturbed_table_is_better(name: str, bits: int) -> None:
    table = few_bit_table(name, bits)
    f = ACTIVATIONS[name].at
    best = squared_error(f, list(table.borders), list(table.levels))
    assert best == pytest.approx(table.error, rel=1e-4)
    generator = torch.Generator().manual_seed(bits)
    for scale in (1e-2, 1e-1, 1.0):
        for _ in range(5):
            noise = torch.randn(2, 2**bits, generator=generator, dtype=torch.float64) * scale
            borders = (numbers(table.borders) + noise[0, 1:]).clamp(-9.9, 9.9).sort().values
            levels = numbers(table.levels) + noise[1] / 10
            assert squared_error(f, borders.tolist(), levels.tolist()) > best
            assert squared_error(f, borders.tolist(), list(table.levels)) > best


@pytest.mark.parametrize("name", ["gelu", "silu", "mish", "tanh", "softplus", "celu"])
def test_both_conditions_of_an_optimum_hold(name: str) -> None:
    table = few_bit_table(name, 3)
    borders, levels = numbers(table.borders), numbers(table.levels)
    at_borders = ACTIVATIONS[name].at(borders)
    assert torch.allclose(at_borders, (levels[:-1] + levels[1:]) / 2, atol=1e-6)
    # The mean of a derivative is the slope of its function: an oracle without quadrature.
    ends = torch.cat([numbers((-10,)), borders, numbers((10,))])
    assert torch.allclose(function_of_torch(name)(ends).diff() / ends.diff(), levels, atol=1e-9)


def test_an_even_functions_mirror_image_is_as_good_and_one_of_them_is_chosen() -> None:
    for name in EVEN:
        for bits in (1, 2, 3, 4):
            table = few_bit_table(name, bits)
            mirrored = [-b for b in reversed(table.borders)]
            error = squared_error(
                ACTIVATIONS[name].at, mirrored, list(reversed(table.levels)))
            assert error == pytest.approx(table.error, rel=1e-4)
            assert sum(border < 0 for border in table.borders) % 2 == 1


@pytest.mark.parametrize("intervals", [2, 3, 4])
def test_cuts_are_those_of_brute_force(intervals: int) -> None:
    generator = torch.Generator().manual_seed(intervals)
    for _ in range(10):
        mass = torch.rand(11, generator=generator, dtype=torch.float64) + 0.1
        f = torch.randn(11, generator=generator, dtype=torch.float64)
        cells = torch.stack([mass, f * mass, f * f * mass])
        prefix = torch.cat([cells.new_zeros(3, 1), cells.cumsum(1)], 1)

        def cost(cuts: tuple[int, ...], mass: Tensor = mass, f: Tensor = f) -> float:
            total = 0.0
            for a, b in pairwise((0, *cuts, 11)):
                level = (f[a:b] * mass[a:b]).sum() / mass[a:b].sum()
                total += float(((f[a:b] - level).square() * mass[a:b]).sum())
            return total

        best = min(combinations(range(1, 11), intervals - 1), key=cost)
        assert optimal_cuts(prefix, intervals) == list(best)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_another_grid_finds_the_same_table(bits: int) -> None:
    for name in ("gelu", "tanh", "selu", "hardswish"):
        other = fit_few_bit_table(name, bits, cells=400)
        assert few_bit_table(name, bits).error == pytest.approx(other.error, rel=1e-9)


@pytest.mark.parametrize("name", EVEN)
def test_the_index_of_a_magnitude_resolves_as_finely_as_one_bit_more(name: str) -> None:
    for bits in (1, 2, 3):
        folded, plain = few_bit_table(name, bits, even=True), few_bit_table(name, bits)
        assert folded.error is not None and plain.error is not None
        assert folded.even and min(folded.borders) > 0
        assert folded.error < plain.error / 2
        # Mirroring its intervals gives a table of 2K - 1 levels. One bit more can only improve on it.
        assert folded.error > (few_bit_table(name, bits + 1).error or 0)
        x = torch.linspace(-10, 10, 77, dtype=torch.float64)
        assert torch.equal(folded.derivative(x), folded.derivative(-x))


def test_one_bit_represents_relu_exactly() -> None:
    assert few_bit_table("relu", 1) == FewBitTable("relu", (0.0,), (0.0, 1.0), error=0.0)
    leaky = few_bit_table("leaky_relu", 1)
    assert leaky.borders == (0.0,) and leaky.levels == pytest.approx((0.01, 1.0), abs=1e-15)
    shrink = few_bit_table("softshrink", 1, even=True, lambd=0.7)
    assert shrink.borders == (0.7,) and shrink.levels == (0.0, 1.0)
    assert shrink.name == "softshrink(lambd=0.7)"


def test_more_intervals_than_values_are_harmless() -> None:
    table = few_bit_table("relu", 3)
    x = torch.tensor([-5.0, -0.1, 0.0, 0.1, 5.0, 1e9, -1e9])
    assert table.error == 0 and table.derivative(x).tolist() == [0, 0, 0, 1, 1, 1, 0]


def test_a_callable_is_fitted_as_its_named_twin() -> None:
    def derivative(x: Tensor) -> Tensor:
        return torch.where(x > 0, 1, 0.25 * x.clamp(max=0).exp())

    own = fit_few_bit_table(derivative, 2, breaks=(0.0,))
    named = few_bit_table("elu", 2, alpha=0.25)
    assert own.name == "derivative" and named.name == "elu(alpha=0.25)"
    assert (own.borders, own.levels) == (named.borders, named.levels) and 0.0 in own.borders
    # Without a hint, the solver finds the jump to the resolution of its search.
    blind = fit_few_bit_table(derivative, 2)
    assert blind.borders == pytest.approx(own.borders, abs=1e-2)


def density(x: Tensor) -> Tensor:
    return torch.exp(-x * x / 2)


def test_a_weighted_fit_is_best_under_its_weight() -> None:
    weighted = fit_few_bit_table("gelu", 3, weight=density)
    plain = few_bit_table("gelu", 3)
    x = torch.linspace(-10, 10, 200001, dtype=torch.float64)
    exact, w = ACTIVATIONS["gelu"].at(x), density(x) * (x[1] - x[0])
    errors = [float(((t.derivative(x) - exact).square() * w).sum()) for t in (weighted, plain)]
    assert errors[0] == pytest.approx(weighted.error, rel=1e-3) and errors[0] < errors[1]
    # Scaling the density scales the error in proportion and changes no table.
    scaled = fit_few_bit_table("gelu", 3, weight=lambda x: 5 * density(x))
    assert scaled.borders == pytest.approx(weighted.borders, abs=1e-6)
    assert scaled.error == pytest.approx(5 * (weighted.error or 0))


def test_a_weight_that_vanishes_leaves_finite_levels() -> None:
    table = fit_few_bit_table("gelu", 4, weight=lambda x: (x.abs() < 1).double())
    assert all(-0.2 < level < 1.2 for level in table.levels)
    assert table.derivative(torch.tensor([-9.0, 9.0])).isfinite().all()


@pytest.mark.parametrize("derivative", [
    lambda x: 2 * x, torch.cos, torch.exp, lambda x: (x < 11).double()],
    ids=["of x^2", "of sin", "of exp", "changes at 11"])
def test_a_derivative_that_does_not_settle_is_refused(
        derivative: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"beyond -10\.\.10 the outermost levels continue"):
        fit_few_bit_table(derivative, 3)
    assert fit_few_bit_table(derivative, 3, check_tails=False).bits == 3


def test_a_narrow_interval_is_refused_where_its_ends_say_nothing_of_the_rest() -> None:
    with pytest.raises(ValueError, match=r"the derivative of gelu is up to .* widen interval"):
        fit_few_bit_table("gelu", 3, interval=(-1, 1))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown function 'gello'; did you mean 'gelu'"):
        few_bit_table("gello", 3)
    with pytest.raises(UnknownNameError, match="parameter of elu 'alhpa'; did you mean 'alpha'"):
        few_bit_table("elu", 3, alhpa=1.0)
    with pytest.raises(TypeError, match="would do nothing"):
        fit_few_bit_table(torch.sigmoid, 3, alpha=1.0)
    for bits in (0, 9):
        with pytest.raises(ValueError, match=r"bits must be in 1\.\.8"):
            few_bit_table("gelu", bits)
    for interval in ((1.0, 1.0), (0.0, torch.inf), (2.0, 1.0)):
        with pytest.raises(ValueError, match="finite interval"):
            few_bit_table("gelu", 1, interval=interval)
    with pytest.raises(ValueError, match=r"cells must be in 8\.\."):
        few_bit_table("gelu", 3, cells=7)
    with pytest.raises(ValueError, match="is not even"):
        few_bit_table("gelu", 3, even=True)
    with pytest.raises(ValueError, match="not even"):
        fit_few_bit_table("tanh", 3, even=True, weight=torch.sigmoid)
    with pytest.raises(ValueError, match="needs an interval"):
        few_bit_table("tanh", 3, even=True, interval=(0, 10))
    with pytest.raises(ValueError, match="must be finite"):
        fit_few_bit_table(lambda x: 1 / (x - x), 1)
    with pytest.raises(ValueError, match="not zero everywhere"):
        fit_few_bit_table("gelu", 1, weight=torch.zeros_like)


@pytest.mark.parametrize(("borders", "levels"), [
    ((), (1.0,)), ((0.0,), (1.0,)), ((1.0, 0.0), (0.0, 1.0, 2.0)), ((torch.nan,), (0.0, 1.0)),
    ((0.0,), (0.0, torch.inf)), (tuple(map(float, range(256))), (0.0,) * 257)])
def test_a_table_that_is_none_is_refused(
        borders: tuple[float, ...], levels: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        FewBitTable("x", borders, levels)


def test_tables_are_solved_wherever_the_user_is() -> None:
    with torch.device("meta"), torch.inference_mode():
        assert fit_few_bit_table("gelu", 2) == few_bit_table("gelu", 2)
    # Saved-tensor hooks of a forward pass must not see the solver.
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x), lambda x: x):
        fit_few_bit_table("mish", 2)
    assert saved == []
