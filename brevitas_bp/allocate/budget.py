"""Chooses one option for each of many tensors: least total cost within a total size.

This is a multiple-choice knapsack problem. ``costs[i][j]`` and ``sizes[i][j]`` belong to option ``j`` of
item ``i``. Each item takes one option. Sizes and the budget have one unit (bytes or bits).
"""

import importlib.util
import itertools
from collections.abc import Sequence
from typing import Any

from brevitas_bp.errors import InfeasibleBudgetError

Table = Sequence[Sequence[float]]


def greedy(costs: Table, sizes: Table, budget: float) -> list[int]:
    """Starts from the largest options and repeatedly takes the step down that does least harm.

    A step goes to a smaller option of an item. Its harm is the growth of cost for each unit of size
    that it frees. If several steps do equal harm, the last item's step is taken, to the largest of its
    options. Source: Chen et al., "ActNN", 2021; Liu et al., "GACT", 2022. In their formulas costs are
    convex in sizes, so each step goes to the next smaller option.

    Returns:
        An option for each item.

    Raises:
        InfeasibleBudgetError: not even the smallest options fit.

    Example: six tensors of equal size, widths 1 to 8, two bits each on average.

        >>> widths = range(1, 9)
        >>> costs = [[c / (2**b - 1)**2 for b in widths] for c in (1000, 100, 10, 1, 0.1, 0.01)]
        >>> [widths[j] for j in greedy(costs, [widths] * 6, 12)]
        [4, 3, 2, 1, 1, 1]
    """
    check_feasible(sizes, budget)
    order = [sorted(range(len(s)), key=lambda j: (s[j], -j), reverse=True) for s in sizes]
    at = [0] * len(costs)
    size = sum(s[o[0]] for s, o in zip(sizes, order))
    steps = [_least_step(*row, 0) for row in zip(costs, sizes, order)]
    while size > budget:
        # An item at its smallest option has no step. The others may all do infinite harm.
        left = [i for i, (_, to) in enumerate(steps) if to != at[i]]
        least = min(steps[i][0] for i in left)
        i = max(i for i in left if steps[i][0] == least)
        size -= sizes[i][order[i][at[i]]]
        at[i] = steps[i][1]
        size += sizes[i][order[i][at[i]]]
        steps[i] = _least_step(costs[i], sizes[i], order[i], at[i])
    return [o[a] for o, a in zip(order, at)]


def thrifty(costs: Table, sizes: Table, budget: float) -> list[int]:
    """Chooses like :func:`greedy`, and spends what is left on the steps up that gain most for it."""
    taken = greedy(costs, sizes, budget)
    while (better := _best_gain(costs, sizes, taken, budget - total(sizes, taken))) is not None:
        taken[better[0]] = better[1]
    return taken


def optimal(costs: Table, sizes: Table, budget: float) -> list[int]:
    """Finds the least total cost that fits, by integer programming (HiGHS through SciPy).

    Returns:
        An option for each item.

    Raises:
        InfeasibleBudgetError: not even the smallest options fit.
        ImportError: SciPy is not installed.
    """
    check_feasible(sizes, budget)
    require_scipy()
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    # No better choice has an option that alone costs more than the whole greedy choice.
    rival = thrifty(costs, sizes, budget)
    most = total(costs, rival)
    if most == float("inf"):
        costs = _finite(costs)
        most = total(costs, rival)
    pairs = [(i, j) for i, row in enumerate(costs) for j, c in enumerate(row) if c <= most]
    cost = np.array([costs[i][j] for i, j in pairs])
    size = np.array([sizes[i][j] for i, j in pairs], dtype=float)
    one = csr_array(
        (np.ones(len(pairs)), ([i for i, _ in pairs], range(len(pairs)))),
        shape=(len(costs), len(pairs)))
    # Costs in units of the greedy total, because the solver stops at an absolute gap of 1e-6.
    found: Any = milp(
        cost / (most or 1.0), integrality=np.ones(len(pairs)), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(size[None] / budget, -np.inf, 1)],
        options={"mip_rel_gap": 1e-6, "time_limit": 60})
    if found.x is None:
        raise RuntimeError(
            f"brevitas_bp.allocate.optimal: HiGHS found nothing ({found.message}); choose "
            "method='greedy'")
    taken: list[int] = [0] * len(costs)
    for (i, j), x in zip(pairs, found.x):
        if x > 0.5:
            taken[i] = j
    # The solver has tolerances. Make sure that the result is not worse than greedy or above the budget.
    fits = total(sizes, taken) <= budget
    return taken if fits and total(costs, taken) <= total(costs, rival) else rival


def _finite(costs: Table) -> list[list[float]]:
    """Replaces infinite costs by one that is larger than all others together."""
    limit = 1 + sum(max((c for c in row if c < float("inf")), default=0.0) for row in costs)
    return [[min(c, 10 * limit) for c in row] for row in costs]


def require_scipy() -> None:
    """Raises if SciPy is not installed.

    Raises:
        ImportError: the message says how to install it.
    """
    if importlib.util.find_spec("scipy") is None:
        raise ImportError(
            "brevitas_bp.allocate: method='optimal' needs SciPy: pip install "
            "'brevitas-bp[plan]', or choose method='greedy'")


def lower_bound(costs: Table, sizes: Table, budget: float) -> float:
    """Returns a total cost that no choice within the budget can undercut.

    It allows fractions of options. The distance of a choice from this bound therefore bounds its
    distance from the best choice.
    """
    check_feasible(sizes, budget)
    rows = [(c, s, lower_hull(c, s)) for c, s in zip(costs, sizes)]
    bound = sum(c[hull[0]] for c, _, hull in rows)
    left = budget - sum(s[hull[0]] for _, s, hull in rows)
    steps = [
        (slope(c, s, low, high), s[high] - s[low])
        for c, s, hull in rows for low, high in itertools.pairwise(hull)]
    for rate, width in sorted(steps):
        used = min(width, left)
        bound += rate * used
        left -= used
    return bound


def total(table: Table, choice: Sequence[int]) -> float:
    """Sums the chosen options."""
    return sum(row[j] for row, j in zip(table, choice))


def check_feasible(sizes: Table, budget: float) -> None:
    """Refuses a budget below the smallest options.

    Raises:
        InfeasibleBudgetError: the message says how much is missing.
    """
    least = sum(min(row) for row in sizes)
    if least > budget:
        raise InfeasibleBudgetError(
            f"brevitas_bp.allocate: the budget is {budget:,.0f} but the smallest options take "
            f"{least:,.0f}, {least - budget:,.0f} more")


def _best_gain(
        costs: Table, sizes: Table, taken: Sequence[int], spare: float) -> tuple[int, int] | None:
    """Returns the item and the option that lower the cost most for each unit of size, or None."""
    best, most = None, 0.0
    for i, j in enumerate(taken):
        for other, size in enumerate(sizes[i]):
            gain, growth = costs[i][j] - costs[i][other], size - sizes[i][j]
            if gain > 0 and growth <= spare:
                rate = gain / growth if growth > 0 else float("inf")
                if rate > most:
                    best, most = (i, other), rate
    return best


def _least_step(
        costs: Sequence[float], sizes: Sequence[float], order: Sequence[int],
        at: int) -> tuple[float, int]:
    """Returns the least harm of a step from place ``at`` of ``order``, and the place it leads to."""
    return min(
        ((_harm(costs, sizes, order[at], order[to]), to) for to in range(at + 1, len(order))),
        default=(float("inf"), at))


def _harm(costs: Sequence[float], sizes: Sequence[float], high: int, low: int) -> float:
    """Returns the growth of cost for each unit of size freed.

    If a step frees nothing, it counts as free if it adds no cost, and as infinitely harmful otherwise.
    """
    freed = sizes[high] - sizes[low]
    growth = costs[low] - costs[high] if costs[low] != costs[high] else 0.0
    return growth / freed if freed > 0 else (float("-inf") if growth <= 0 else float("inf"))


def worth_having(costs: Sequence[float], sizes: Sequence[float]) -> list[int]:
    """Returns the options that no other option beats in both size and cost, smallest size first."""
    kept: list[int] = []
    for j in sorted(range(len(costs)), key=lambda j: (sizes[j], costs[j])):
        if not kept or costs[j] < costs[kept[-1]]:
            kept.append(j)
    return kept


def lower_hull(costs: Sequence[float], sizes: Sequence[float]) -> list[int]:
    """Returns the options that are best at some price of size, smallest size first."""
    hull: list[int] = []
    for j in worth_having(costs, sizes):
        hull.append(j)
        while len(hull) > 2 and slope(costs, sizes, *hull[-3:-1]) >= slope(costs, sizes, *hull[-2:]):
            del hull[-2]
    return hull


def slope(costs: Sequence[float], sizes: Sequence[float], low: int, high: int) -> float:
    """Returns the cost that the step from an option to a larger one adds for each unit of size."""
    return (costs[high] - costs[low]) / (sizes[high] - sizes[low])
