"""Finds the optimal borders of a piecewise-constant function: a grid search, then refinement.

1. Dynamic programming on a grid finds the basin of the global optimum.
2. The same program on ever finer windows around each border refines it.
3. Newton's method finds the borders at which the conditions of :mod:`brevitas_bp.activations.few_bit`
   hold.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

#: Cells of the quadrature; three Gauss points in each leave an error near 1e-15.
FINE = 8192
_GAUSS_POINTS = (0.5 - math.sqrt(0.15), 0.5, 0.5 + math.sqrt(0.15))
_GAUSS_WEIGHTS = (5 / 18, 8 / 18, 5 / 18)
# Refinement stops at this share of the interval: the error is flat there, to float64 precision.
_RESOLUTION = 1e-9
# Newton's method: the number of steps after the refinement; half the distance for estimating a slope,
# and the farthest step, both as shares of the interval; and the rise of the derivative over this
# distance that counts as a jump.
_STEPS, _NEAR, _OPEN, _JUMP = 4, 1e-6, 1e-6, 1e-3
# Rounds of refinement in which windows may keep their width. Fits of more than 5 bits would use more
# rounds.
_TRIES = 40
# Borders this close (as a share of the interval) to a jump or to zero are moved onto it.
_SNAP = 1e-7


def optimal_cuts(prefix: Tensor, intervals: int) -> list[int]:
    """Finds the best cuts of a grid into intervals, by dynamic programming.

    Args:
        prefix: [3, n + 1], integrals of ``w``, ``f' w`` and ``f'**2 w`` up to each node of the grid.
        intervals: K, at most n.

    Returns:
        Indices of the K - 1 inner nodes, ascending.
    """
    # The cost is [right, left], so each minimum runs along contiguous memory.
    cost = _cost(prefix.unsqueeze(1), prefix.unsqueeze(2))
    cost.masked_fill_(torch.ones_like(cost, dtype=torch.bool).triu(), torch.inf)
    return _cheapest_path([cost[:, :1], *[cost] * (intervals - 2), cost[-1:]])


class Integrals:
    """Integrals of ``w``, ``f' w`` and ``f'**2 w`` from the left end to any point."""

    def __init__(
            self, derivative: Function, weight: Function | None, lo: float, hi: float,
            breaks: Sequence[float]) -> None:
        self.derivative, self.weight = derivative, weight
        nodes = torch.linspace(lo, hi, FINE + 1, dtype=torch.float64)
        self.nodes = torch.cat([nodes, nodes.new_tensor(breaks)]).unique()
        cells = self._between(self.nodes[:-1], self.nodes[1:])
        if not torch.isfinite(cells).all() or (cells[0] < 0).any() or not cells[0].sum() > 0:
            raise ValueError(
                "brevitas_bp.activations.few_bit: the derivative must be finite on the interval, and "
                "the weight finite, not negative and not zero everywhere")
        self.prefix = torch.cat([cells.new_zeros(3, 1), cells.cumsum(1)], 1)

    def _between(self, left: Tensor, right: Tensor) -> Tensor:
        """Returns the integrals [3, ...] from ``left`` to ``right``, both within one cell."""
        width = (right - left).unsqueeze(-1)
        x = left.unsqueeze(-1) + width * left.new_tensor(_GAUSS_POINTS)
        w = width * left.new_tensor(_GAUSS_WEIGHTS)
        w = w if self.weight is None else w * self.weight(x)
        f = self.derivative(x)
        return torch.stack([w, f * w, f * f * w]).sum(-1)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the integrals [3, ...] up to ``x`` [...]."""
        cell = (torch.searchsorted(self.nodes, x, right=True) - 1).clamp(0, len(self.nodes) - 2)
        return self.prefix[:, cell] + self._between(self.nodes[cell], x)

    def ends(self, borders: Tensor) -> Tensor:
        """Returns the borders with both ends of the interval."""
        return torch.cat([self.nodes[:1], borders, self.nodes[-1:]])

    def levels(self, borders: Tensor) -> Tensor:
        """Returns the mean of the derivative on each interval."""
        ends = self.ends(borders)
        mass, first, _ = self(ends).diff(dim=1)
        middle = self.derivative((ends[:-1] + ends[1:]) / 2)
        # If no input ever falls into an interval, any level is optimal. Take a value of the derivative.
        mean = torch.where(mass > 0, first / mass, middle)
        f = self.derivative(self.nodes)
        return mean.clamp(f.min(), f.max())

    def error(self, borders: Tensor) -> float:
        """Returns the squared error of the best levels for these borders."""
        prefix = self(self.ends(borders))
        return float(_cost(prefix[:, :-1], prefix[:, 1:]).sum())


def _cost(left: Tensor, right: Tensor) -> Tensor:
    """Returns the squared error of an interval with its mean as level, from prefix integrals."""
    mass, first, second = (right[i] - left[i] for i in range(3))
    explained = torch.where(mass > 0, first.square_().div_(mass), 0)
    return second.sub_(explained).clamp_(min=0)


def _cheapest_path(costs: Sequence[Tensor]) -> list[int]:
    """Returns one node per layer between ``costs[k]`` [to, from], ends excluded, at least total cost."""
    best, choices = costs[0][:, 0], []
    for cost in costs[1:]:
        best, chosen = (cost + best).min(1)
        choices.append(chosen)
    path = [0]
    for chosen in reversed(choices):
        path.append(int(chosen[path[-1]]))
    return path[:0:-1]


def optimal_borders(
        integrals: Integrals, intervals: int, cells: int, breaks: Sequence[float]) -> Tensor:
    """Finds the inner borders of the intervals that give the least squared error.

    Args:
        integrals: integrals of the function that is fitted.
        intervals: number of intervals.
        cells: cells of the first grid.
        breaks: points within the interval at which the function jumps or has a kink.

    Returns:
        float64 [intervals - 1], ascending.
    """
    grid = _grid(integrals, cells, breaks)
    nodes = integrals.nodes[grid]
    cuts = optimal_cuts(integrals.prefix[:, grid], intervals)
    widths = nodes.diff()
    near = torch.tensor(cuts)
    borders = _refine(integrals, nodes[near], torch.maximum(widths[near - 1], widths[near]) / 2)
    borders = _polished(integrals, borders)
    return _canonical(integrals, _snapped(integrals, borders, breaks))


def _grid(integrals: Integrals, cells: int, breaks: Sequence[float]) -> Tensor:
    """Returns the fine nodes of the first grid: half spread evenly, half where borders will be dense."""
    nodes = integrals.nodes
    widths = nodes.diff()
    slope = integrals.derivative(nodes).diff() / widths
    # Bennett: if there are many optimal intervals, they have the density (w f''**2) ** (1/3).
    dense = (integrals.prefix[0].diff() / widths * slope.square()).pow(1 / 3) * widths
    total = dense.sum()
    share = widths / widths.sum() + (dense / total if total > 0 else 0)
    position = torch.cat([share.new_zeros(1), share.cumsum(0)])
    wanted = torch.linspace(0, float(position[-1]), cells + 1, dtype=torch.float64)
    fixed = torch.searchsorted(nodes, nodes.new_tensor([*breaks, float(nodes[-1])]))
    taken = torch.searchsorted(position, wanted).clamp(max=len(nodes) - 1)
    return torch.cat([taken, fixed]).unique()


def _refine(integrals: Integrals, borders: Tensor, step: Tensor) -> Tensor:
    """Refines borders by dynamic programming on windows of nine points around each, until they are fine.

    The windows are halved in each round. A border at the edge of its window may want to go further:
    windows then keep their width until no border does.
    """
    lo, hi = integrals.nodes[0], integrals.nodes[-1]
    offsets = torch.arange(-4, 5, dtype=torch.float64)
    tries = _TRIES
    while step.max() > _RESOLUTION * (hi - lo):
        window = (borders.unsqueeze(1) + step.unsqueeze(1) * offsets).clamp(lo, hi)
        layers = torch.cat([lo.expand(1, 9), window, hi.expand(1, 9)])
        prefix = integrals(layers)
        cost = _cost(prefix[:, :-1].unsqueeze(2), prefix[:, 1:].unsqueeze(3))
        cost.masked_fill_(layers[:-1].unsqueeze(1) >= layers[1:].unsqueeze(2), torch.inf)
        path = _cheapest_path([cost[0, :, :1], *cost[1:-1], cost[-1, :1]])
        chosen = torch.tensor(path)
        moved = window.gather(1, chosen.unsqueeze(1)).squeeze(1)
        at_edge = ((chosen % 8 == 0) & (moved != borders)).any()
        borders, tries = moved, tries - 1
        if not at_edge or tries <= 0:
            step = step / 2
    return borders


def _polished(integrals: Integrals, borders: Tensor) -> Tensor:
    """Applies Newton's method to the condition ``f'(c_i) = (y_{i-1} + y_i) / 2``.

    The error is flat around its optimum. Comparing errors therefore finds a border only to some 1e-7,
    and differently on another processor. The condition finds the border to some 1e-12. Two kinds of
    borders stay: borders at a jump, and borders whose step would exceed what the search left open.
    """
    width = float(integrals.nodes[-1] - integrals.nodes[0])
    for _ in range(_STEPS):
        mass, levels = integrals(integrals.ends(borders)).diff(dim=1)[0], integrals.levels(borders)
        f, w = integrals.derivative(borders), torch.ones_like(borders)
        w = w if integrals.weight is None else integrals.weight(borders)
        near = torch.stack((borders - _NEAR * width, borders + _NEAR * width))
        rise = integrals.derivative(near).diff(dim=0)[0]
        slope = rise / (2 * _NEAR * width)
        # The rate at which the levels below and above a border move with the border.
        below, above = w * (f - levels[:-1]) / mass[:-1], w * (levels[1:] - f) / mass[1:]
        # The lower level also moves with the border below, and the upper level with the border above.
        jacobian = torch.diag(slope - (below + above) / 2)
        jacobian += torch.diag(-w[:-1] * (levels[1:-1] - f[:-1]) / mass[1:-1] / 2, -1)
        jacobian += torch.diag(-w[1:] * (f[1:] - levels[1:-1]) / mass[1:-1] / 2, 1)
        residual = f - (levels[:-1] + levels[1:]) / 2
        step = torch.linalg.lstsq(jacobian, -residual.unsqueeze(1)).solution.squeeze(1)
        moves = (step.abs() <= _OPEN * width) & (rise.abs() < _JUMP)
        borders = torch.where(moves, borders + step, borders)
    return borders


def _snapped(integrals: Integrals, borders: Tensor, breaks: Sequence[float]) -> Tensor:
    """Moves borders next to zero or to a jump onto it."""
    near = _SNAP * float(integrals.nodes[-1] - integrals.nodes[0])
    for point in (0.0, *breaks):
        borders = torch.where((borders - point).abs() < near, point, borders)
    return borders


def _canonical(integrals: Integrals, borders: Tensor) -> Tensor:
    """Returns, of two equally good mirror images, the image that :func:`fit_few_bit_table` documents."""
    mirrored = -borders.flip(0)
    lo, hi = float(integrals.nodes[0]), float(integrals.nodes[-1])
    if lo != -hi or int((borders < 0).sum()) % 2 or (borders == 0).any():
        return borders
    error, other = integrals.error(borders), integrals.error(mirrored)
    return mirrored if math.isclose(error, other, rel_tol=1e-6, abs_tol=1e-12) else borders
