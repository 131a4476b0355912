"""Knapsacks: golden allocations of the papers, brute force, bounds."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brevitas_bp.allocate.budget import greedy, lower_bound, optimal, thrifty, total
from brevitas_bp.errors import InfeasibleBudgetError

SENSITIVITY = [1000, 100, 10, 1, 0.1, 0.01]
ACTNN = [1, 2, 3, 4, 5, 6, 7, 8]
GACT = [1, 2, 4, 8, 32]

#: (chain, bits that level 1 takes, average bits) -> bits of six tensors of equal size.
GOLDEN = {
    ("ActNN", 1.0, 1): [1, 1, 1, 1, 1, 1], ("ActNN", 0.5, 1): [3, 1, 1, 1, 1, 1],
    ("ActNN", 0.25, 1): [3, 2, 1, 1, 1, 1],
    ("ActNN", 1.0, 1.25): [2, 1, 1, 1, 1, 1], ("ActNN", 0.5, 1.25): [3, 2, 1, 1, 1, 1],
    ("ActNN", 0.25, 1.25): [4, 2, 1, 1, 1, 1],
    ("ActNN", 1.0, 1.5): [3, 2, 1, 1, 1, 1], ("ActNN", 0.5, 1.5): [4, 3, 1, 1, 1, 1],
    ("ActNN", 0.25, 1.5): [4, 3, 1, 1, 1, 1],
    ("ActNN", 1.0, 2): [4, 3, 2, 1, 1, 1], ("ActNN", 0.5, 2): [5, 3, 2, 1, 1, 1],
    ("ActNN", 0.25, 2): [5, 4, 2, 1, 1, 1],
    ("GACT", 1.0, 1): [1, 1, 1, 1, 1, 1], ("GACT", 0.5, 1): [2, 2, 1, 1, 1, 1],
    ("GACT", 1.0, 1.5): [2, 2, 1, 1, 1, 1], ("GACT", 0.5, 1.5): [4, 2, 1, 1, 1, 1],
    ("GACT", 1.0, 2): [4, 2, 2, 1, 1, 1], ("GACT", 0.5, 2): [4, 4, 2, 1, 1, 1],
    ("GACT", 1.0, 3): [8, 4, 2, 2, 1, 1], ("GACT", 0.5, 3): [8, 4, 2, 2, 1, 1],
    ("GACT", 1.0, 4): [8, 8, 4, 2, 1, 1], ("GACT", 0.5, 4): [8, 8, 4, 2, 1, 1],
}


def cost(sensitivity: float, bits: int) -> float:
    """``C / (2^b - 1)^2``; 32 bits are exact."""
    return 0.0 if bits == 32 else sensitivity / (2**bits - 1) ** 2


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_golden_allocations(case: tuple[str, float, float]) -> None:
    chain, lowest, target = case
    widths = ACTNN if chain == "ActNN" else GACT
    costs = [[cost(c, b) for b in widths] for c in SENSITIVITY]
    sizes = [[lowest if b == 1 else float(b) for b in widths]] * 6
    assert [widths[j] for j in greedy(costs, sizes, 6 * target)] == GOLDEN[case]


def brute_force(costs: list[list[float]], sizes: list[list[float]], budget: float) -> float:
    """Returns the least total cost of all choices that fit."""
    choices = itertools.product(*(range(len(row)) for row in costs))
    return min(total(costs, c) for c in choices if total(sizes, c) <= budget)


def instance(seed: int, equal: bool) -> tuple[list[list[float]], list[list[float]], float]:
    """Returns five items with four widths each."""
    draw = random.Random(seed)
    weights = [1 if equal else draw.choice([1, 2, 7, 20]) for _ in range(5)]
    scales = [10 ** draw.uniform(-6, 6) for _ in range(5)]
    costs = [[cost(c * w, b) for b in (1, 2, 4, 8)] for c, w in zip(scales, weights)]
    sizes = [[float(w * b) for b in (1, 2, 4, 8)] for w in weights]
    return costs, sizes, sum(weights) * draw.uniform(1, 6)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_optimal_is_brute_force(seed: int, equal: bool) -> None:
    costs, sizes, budget = instance(seed, equal)
    best, chosen = brute_force(costs, sizes, budget), optimal(costs, sizes, budget)
    assert total(sizes, chosen) <= budget
    # The solver stops at a gap of 1e-6 of the greedy cost, absolute or relative.
    gap = 1.1e-6 * total(costs, greedy(costs, sizes, budget))
    assert total(costs, chosen) <= best + gap


def test_greedy_is_not_always_optimal() -> None:
    # The control for the test above: greedy alone is worse, so a solver is needed.
    worse = 0
    for seed in range(20):
        costs, sizes, budget = instance(seed, equal=False)
        worse += total(costs, greedy(costs, sizes, budget)) > 1.05 * brute_force(costs, sizes, budget)
    assert worse >= 3


tables = st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(1, 50)), min_size=1, max_size=6)


@given(tables, st.floats(1, 9))
def test_no_choice_is_below_the_bound(items: list[tuple[float, int]], average: float) -> None:
    widths = [1, 2, 3, 8]
    costs = [[cost(c, b) for b in widths] for c, _ in items]
    sizes = [[float(w * b) for b in widths] for _, w in items]
    budget = average * sum(w for _, w in items)
    bound, best = lower_bound(costs, sizes, budget), brute_force(costs, sizes, budget)
    slack = 1e-9 * sum(map(max, costs))
    assert bound <= best + slack
    for solve in (greedy, optimal):
        chosen = solve(costs, sizes, budget)
        assert total(sizes, chosen) <= budget + 1e-9
        assert total(costs, chosen) >= bound - slack


@given(tables)
def test_more_budget_never_costs_more(items: list[tuple[float, int]]) -> None:
    widths = [1, 2, 4, 8]
    costs = [[cost(c, b) for b in widths] for c, _ in items]
    sizes = [[float(w * b) for b in widths] for _, w in items]
    least = sum(w for _, w in items)
    found = [total(costs, greedy(costs, sizes, least * factor)) for factor in (1, 1.5, 2, 4, 8)]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("solve", [greedy, optimal])
def test_infeasible_budgets_say_by_how_much(solve: object) -> None:
    assert callable(solve)
    with pytest.raises(InfeasibleBudgetError, match=r"budget is 2,000 but .* take 3,000, 1,000 more"):
        solve([[1.0, 0.5]] * 3, [[1000.0, 2000.0]] * 3, 2000)


def test_spare_size_is_spent_on_the_best_steps() -> None:
    # From 3 to 1 the first item frees more than it has to. The second can have what is left.
    costs, sizes = [[0.0, 9.0], [0.0, 1.0, 2.0]], [[10.0, 1.0], [9.0, 5.0, 1.0]]
    assert greedy(costs, sizes, 10) == [1, 2]
    assert thrifty(costs, sizes, 10) == [1, 0]
    assert thrifty(costs, sizes, 2) == [1, 2]


def test_infinite_errors_end() -> None:
    inf = float("inf")
    costs, sizes = [[inf, 0.0], [0.1, 0.0]], [[1.0, 32.0], [1.0, 32.0]]
    for choose in (greedy, thrifty, optimal):
        assert choose(costs, sizes, 40) == [1, 0]
        assert choose(costs, sizes, 20) == [0, 0]
    assert greedy([[inf, inf]], [[1.0, 2.0]], 1) == [0]
