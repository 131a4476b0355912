"""Optimal piecewise-constant derivatives: the tables of Few-Bit Backward.

The backward of ``y = f(x)`` multiplies by ``f'(x)``. A table cuts the line into ``2**bits`` intervals
with one level each, so that an interval's index is all that has to be saved of ``x``. It minimises

    ``sum_i int_{c_i}^{c_{i+1}} (f'(x) - y_i)**2 w(x) dx``

whose conditions are ``y_i = int f' w / int w`` over the interval and ``f'(c_i) = (y_{i-1} + y_i) / 2``.
Dynamic programming on a grid finds the basin of the global optimum, and the same program on ever finer
windows around each border refines it until both conditions hold. Other grids find the same tables up to
6 bits; at 7 and 8 a grid cell is no longer small beside an interval, and errors may be 0.2 % above the
optimum.

Source: Novikov et al., "Few-bit backward: quantized gradients of activation functions for memory
footprint reduction", 2022. Its published tables were fitted by descent, and several are local optima.
"""

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from brevitas_bp.activations.closed_forms import DERIVATIVES
from brevitas_bp.errors import UnknownNameError, nearest

Function = Callable[[Tensor], Tensor]

_WHERE = "brevitas_bp.activations.few_bit"
# Cells of the quadrature; three Gauss points in each leave an error near 1e-15.
_FINE = 8192
_GAUSS_POINTS = (0.5 - math.sqrt(0.15), 0.5, 0.5 + math.sqrt(0.15))
_GAUSS_WEIGHTS = (5 / 18, 8 / 18, 5 / 18)
# Refinement stops at this share of the interval: the error is flat there, to float64 precision.
_RESOLUTION = 1e-9
# Newton's steps after it; half the distance over which a slope is taken, and the farthest step, as
# shares of the interval; and what the derivative rises by on that distance where it jumps.
_STEPS, _NEAR, _OPEN, _JUMP = 4, 1e-6, 1e-6, 1e-3
# Rounds of refinement in which windows may stay as wide; more than 5 bits would use.
_TRIES = 40
# Processors differ in the last bits of exponentials, and tables must not: digits of borders, around
# which the error is flat, beside the width of the interval; and of levels, beside the largest.
_BORDER_DIGITS, _LEVEL_DIGITS = 7, 11
# Borders this close (as a share of the interval) to a jump or to zero are meant to be there.
_SNAP = 1e-7


@dataclass(frozen=True)
class FewBitTable:
    """A derivative that takes one constant level per interval.

    Attributes:
        name: of the function, for reports.
        borders: K - 1 inner borders, ascending. ``x`` equal to a border is in the lower interval.
        levels: K derivatives. The outermost two continue to infinity.
        even: intervals are those of ``|x|``.
        error: integral of the squared error over the whole fitted interval, weighted if the fit was;
            None where unknown.

    Raises:
        ValueError: levels that are not 2..256, or borders that do not fit them.

    >>> FewBitTable("relu", (0.0,), (0.0, 1.0)).derivative(torch.tensor([-2.0, 0.0, 3.0])).tolist()
    [0.0, 0.0, 1.0]
    """

    name: str
    borders: tuple[float, ...]
    levels: tuple[float, ...]
    even: bool = False
    error: float | None = None

    def __post_init__(self) -> None:
        ascending = all(a <= b for a, b in zip(self.borders, self.borders[1:]))
        if len(self.levels) != len(self.borders) + 1 or not 2 <= len(self.levels) <= 256:
            raise ValueError(
                f"{_WHERE}.FewBitTable: expected 2..256 levels and one border less, got "
                f"{len(self.levels)} levels and {len(self.borders)} borders")
        if not ascending or not all(map(math.isfinite, self.borders + self.levels)):
            raise ValueError(
                f"{_WHERE}.FewBitTable: expected finite levels and ascending finite borders, got "
                f"borders {self.borders} and levels {self.levels}")

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return (len(self.levels) - 1).bit_length()

    def derivative(self, x: Tensor) -> Tensor:
        """The level of every element, in the dtype of ``x``; NaN for NaN."""
        inner = torch.float64 if x.dtype == torch.float64 else torch.float32
        borders = torch.tensor(self.borders, dtype=inner, device=x.device)
        levels = torch.tensor(self.levels, dtype=torch.float64, device=x.device)
        x = x.contiguous()
        index = torch.bucketize((x.abs() if self.even else x).to(inner), borders)
        return torch.where(x.isnan(), torch.nan, levels[index]).to(x.dtype)


@torch.no_grad()
def fit_few_bit_table(
        function: str | Function, bits: int, *, interval: tuple[float, float] = (-10.0, 10.0),
        cells: int = 1024, weight: Function | None = None, even: bool = False,
        breaks: Sequence[float] = (), check_tails: bool = True, name: str | None = None,
        **parameters: float) -> FewBitTable:
    """The optimal table of ``2**bits`` levels for a derivative on an interval.

    Where several tables are equally good (mirror images), the one whose interval around zero has an
    odd index is taken, so that every machine finds the same one.

    Args:
        function: a name of :data:`DERIVATIVES`, or the derivative itself, elementwise on float64
            tensors.
        bits: 1..8.
        interval: where the error counts. Beyond it the outermost levels continue.
        cells: of the first grid, more where the derivative varies: O(2**bits * cells**2).
        weight: density of the inputs, not necessarily normalised; uniform by default.
        even: index ``|x|``, which resolves twice as finely; for even derivatives.
        breaks: where a derivative of your own jumps; named ones know.
        check_tails: refuse a derivative that leaves the outermost levels beyond the interval. Switch
            it off only where no input can lie there.
        name: for reports; by default that of the function.
        parameters: of the named function, such as ``alpha`` of ELU.

    Raises:
        UnknownNameError: a name or parameter that is not known.
        ValueError: settings out of range; ``even`` for a derivative that is not; a derivative that is
            not finite, or far from the outermost levels beyond the interval (``x**2``, periodic ones).

    >>> fit_few_bit_table("gelu", 1).borders
    (0.0,)
    """
    derivative, own_breaks, own_name = _resolve(function, parameters)
    _check(bits, interval, cells, even)
    lo, hi = (0.0, float(interval[1])) if even else interval
    inner = [b for b in (*breaks, *own_breaks) if lo < b < hi]
    # A few small float64 tensors, wherever the user's own are made by default.
    with torch.device("cpu"):
        integrals = _Integrals(derivative, weight, lo, hi, inner)
        if even:
            _check_even(integrals, own_name)
        borders = _rounded(_solve(integrals, 2**bits, cells, inner), hi - lo, _BORDER_DIGITS)
        levels = integrals.levels(borders)
        levels = _rounded(levels, float(levels.abs().max()), _LEVEL_DIGITS)
        if check_tails:
            _check_tails(integrals, borders, levels, even, own_name)
        error = integrals.error(borders) * (2 if even else 1)
    return FewBitTable(
        name or own_name, tuple(borders.tolist()), tuple(levels.tolist()), even, error)


@lru_cache(maxsize=256)
def few_bit_table(
        name: str, bits: int, *, interval: tuple[float, float] = (-10.0, 10.0), even: bool = False,
        **settings: Any) -> FewBitTable:
    """:func:`fit_few_bit_table` of a named function, solved at first use and kept.

    Takes a few hundredths of a second up to 4 bits, under a second at 8. ``settings`` are the others of
    that function, and parameters of the named one.

    >>> few_bit_table("silu", 3) is few_bit_table("silu", 3)
    True
    """
    return fit_few_bit_table(name, bits, interval=interval, even=even, **settings)


def optimal_cuts(prefix: Tensor, intervals: int) -> list[int]:
    """The best cuts of a grid into intervals, by dynamic programming.

    Args:
        prefix: [3, n + 1], integrals of ``w``, ``f' w`` and ``f'**2 w`` up to each of the grid's nodes.
        intervals: K, at most n.

    Returns:
        Indices of the K - 1 inner nodes, ascending.
    """
    # [right, left], so that each minimum runs along contiguous memory.
    cost = _cost(prefix.unsqueeze(1), prefix.unsqueeze(2))
    cost.masked_fill_(torch.ones_like(cost, dtype=torch.bool).triu(), torch.inf)
    return _cheapest_path([cost[:, :1], *[cost] * (intervals - 2), cost[-1:]])


class _Integrals:
    """Integrals of ``w``, ``f' w`` and ``f'**2 w`` from the left end to any point."""

    def __init__(
            self, derivative: Function, weight: Function | None, lo: float, hi: float,
            breaks: Sequence[float]) -> None:
        self.derivative, self.weight = derivative, weight
        nodes = torch.linspace(lo, hi, _FINE + 1, dtype=torch.float64)
        self.nodes = torch.cat([nodes, nodes.new_tensor(breaks)]).unique()
        cells = self._between(self.nodes[:-1], self.nodes[1:])
        if not torch.isfinite(cells).all() or (cells[0] < 0).any() or not cells[0].sum() > 0:
            raise ValueError(
                f"{_WHERE}: the derivative must be finite on the interval, and the weight finite, "
                "not negative and not zero everywhere")
        self.prefix = torch.cat([cells.new_zeros(3, 1), cells.cumsum(1)], 1)

    def _between(self, left: Tensor, right: Tensor) -> Tensor:
        """The integrals [3, ...] from ``left`` to ``right``, both within one cell."""
        width = (right - left).unsqueeze(-1)
        x = left.unsqueeze(-1) + width * left.new_tensor(_GAUSS_POINTS)
        w = width * left.new_tensor(_GAUSS_WEIGHTS)
        w = w if self.weight is None else w * self.weight(x)
        f = self.derivative(x)
        return torch.stack([w, f * w, f * f * w]).sum(-1)

    def __call__(self, x: Tensor) -> Tensor:
        """The integrals [3, ...] up to ``x`` [...]."""
        cell = (torch.searchsorted(self.nodes, x, right=True) - 1).clamp(0, len(self.nodes) - 2)
        return self.prefix[:, cell] + self._between(self.nodes[cell], x)

    def ends(self, borders: Tensor) -> Tensor:
        """The borders with both ends of the interval."""
        return torch.cat([self.nodes[:1], borders, self.nodes[-1:]])

    def levels(self, borders: Tensor) -> Tensor:
        """The mean of the derivative on each interval."""
        ends = self.ends(borders)
        mass, first, _ = self(ends).diff(dim=1)
        middle = self.derivative((ends[:-1] + ends[1:]) / 2)
        # Where no input ever falls any level is optimal: one that the derivative takes.
        mean = torch.where(mass > 0, first / mass, middle)
        f = self.derivative(self.nodes)
        return mean.clamp(f.min(), f.max())

    def error(self, borders: Tensor) -> float:
        """The squared error of the best levels for these borders."""
        prefix = self(self.ends(borders))
        return float(_cost(prefix[:, :-1], prefix[:, 1:]).sum())


def _cost(left: Tensor, right: Tensor) -> Tensor:
    """Squared error of one interval with its mean as level, from prefix integrals at its ends."""
    mass, first, second = (right[i] - left[i] for i in range(3))
    explained = torch.where(mass > 0, first.square_().div_(mass), 0)
    return second.sub_(explained).clamp_(min=0)


def _cheapest_path(costs: Sequence[Tensor]) -> list[int]:
    """One node per layer between ``costs[k]`` [to, from], ends excluded, with the least total cost."""
    best, choices = costs[0][:, 0], []
    for cost in costs[1:]:
        best, chosen = (cost + best).min(1)
        choices.append(chosen)
    path = [0]
    for chosen in reversed(choices):
        path.append(int(chosen[path[-1]]))
    return path[:0:-1]


def _solve(integrals: _Integrals, intervals: int, cells: int, breaks: Sequence[float]) -> Tensor:
    grid = _grid(integrals, cells, breaks)
    nodes = integrals.nodes[grid]
    cuts = optimal_cuts(integrals.prefix[:, grid], intervals)
    widths = nodes.diff()
    near = torch.tensor(cuts)
    borders = _refine(integrals, nodes[near], torch.maximum(widths[near - 1], widths[near]) / 2)
    borders = _polished(integrals, borders)
    return _canonical(integrals, _snapped(integrals, borders, breaks))


def _grid(integrals: _Integrals, cells: int, breaks: Sequence[float]) -> Tensor:
    """Which fine nodes the first grid takes: half spread evenly, half where borders will be dense."""
    nodes = integrals.nodes
    widths = nodes.diff()
    slope = integrals.derivative(nodes).diff() / widths
    # Bennett: many optimal intervals have the density (w f''**2) ** (1/3).
    dense = (integrals.prefix[0].diff() / widths * slope.square()).pow(1 / 3) * widths
    total = dense.sum()
    share = widths / widths.sum() + (dense / total if total > 0 else 0)
    position = torch.cat([share.new_zeros(1), share.cumsum(0)])
    wanted = torch.linspace(0, float(position[-1]), cells + 1, dtype=torch.float64)
    fixed = torch.searchsorted(nodes, nodes.new_tensor([*breaks, float(nodes[-1])]))
    taken = torch.searchsorted(position, wanted).clamp(max=len(nodes) - 1)
    return torch.cat([taken, fixed]).unique()


def _refine(integrals: _Integrals, borders: Tensor, step: Tensor) -> Tensor:
    """Dynamic programming on windows of nine points around each border, halved until they are fine.

    A border at the edge of its window may want to go further: windows stay as wide until none does.
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


def _polished(integrals: _Integrals, borders: Tensor) -> Tensor:
    """Newton's method on the condition ``f'(c_i) = (y_{i-1} + y_i) / 2``.

    The error is flat around its optimum: comparing errors finds a border to some 1e-7, which is another
    1e-7 on another processor. The condition finds it to some 1e-12. Borders at a jump stay, and those
    that a step would move further than the search left open.
    """
    width = float(integrals.nodes[-1] - integrals.nodes[0])
    for _ in range(_STEPS):
        mass, levels = integrals(integrals.ends(borders)).diff(dim=1)[0], integrals.levels(borders)
        f, w = integrals.derivative(borders), torch.ones_like(borders)
        w = w if integrals.weight is None else integrals.weight(borders)
        near = torch.stack((borders - _NEAR * width, borders + _NEAR * width))
        rise = integrals.derivative(near).diff(dim=0)[0]
        slope = rise / (2 * _NEAR * width)
        # How far the levels below and above a border move with it.
        below, above = w * (f - levels[:-1]) / mass[:-1], w * (levels[1:] - f) / mass[1:]
        # The lower level moves with the border below, too; the upper one with the border above.
        jacobian = torch.diag(slope - (below + above) / 2)
        jacobian += torch.diag(-w[:-1] * (levels[1:-1] - f[:-1]) / mass[1:-1] / 2, -1)
        jacobian += torch.diag(-w[1:] * (f[1:] - levels[1:-1]) / mass[1:-1] / 2, 1)
        residual = f - (levels[:-1] + levels[1:]) / 2
        step = torch.linalg.lstsq(jacobian, -residual.unsqueeze(1)).solution.squeeze(1)
        moves = (step.abs() <= _OPEN * width) & (rise.abs() < _JUMP)
        borders = torch.where(moves, borders + step, borders)
    return borders


def _snapped(integrals: _Integrals, borders: Tensor, breaks: Sequence[float]) -> Tensor:
    """Borders next to zero or to a jump moved there."""
    near = _SNAP * float(integrals.nodes[-1] - integrals.nodes[0])
    for point in (0.0, *breaks):
        borders = torch.where((borders - point).abs() < near, point, borders)
    return borders


def _rounded(x: Tensor, size: float, digits: int) -> Tensor:
    """Values of order ``size`` at most, to so many digits behind its first."""
    if size == 0:
        return x
    digits -= math.floor(math.log10(size))
    return torch.tensor([round(v, digits) for v in x.tolist()], dtype=torch.float64)


def _canonical(integrals: _Integrals, borders: Tensor) -> Tensor:
    """Of two mirror images that are equally good, the one of :func:`fit_few_bit_table`."""
    mirrored = -borders.flip(0)
    lo, hi = float(integrals.nodes[0]), float(integrals.nodes[-1])
    if lo != -hi or int((borders < 0).sum()) % 2 or (borders == 0).any():
        return borders
    error, other = integrals.error(borders), integrals.error(mirrored)
    return mirrored if math.isclose(error, other, rel_tol=1e-6, abs_tol=1e-12) else borders


def _resolve(
        function: str | Function,
        parameters: dict[str, float]) -> tuple[Function, tuple[float, ...], str]:
    """The derivative, where it jumps, and its name."""
    if not isinstance(function, str):
        if parameters:
            raise TypeError(
                f"{_WHERE}: {sorted(parameters)} would do nothing: a derivative given as a function "
                "has its parameters bound; use functools.partial")
        return function, (), getattr(function, "__name__", "function")
    _check_name("function", function, DERIVATIVES)
    known = DERIVATIVES[function]
    names = list(inspect.signature(known.derivative).parameters)[1:]
    for parameter in parameters:
        _check_name(f"parameter of {function}", parameter, names)
    shown = ", ".join(f"{key}={value:g}" for key, value in parameters.items())
    return (
        partial(known.derivative, **parameters), known.breaks(**parameters),
        f"{function}({shown})" if shown else function)


def _check_name(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise UnknownNameError(
            f"{_WHERE}: unknown {what} {name!r}{nearest(name, known)}; known: "
            f"{', '.join(sorted(known)) or 'none'}")


def _check(bits: int, interval: tuple[float, float], cells: int, even: bool) -> None:
    if bits not in range(1, 9):
        raise ValueError(f"{_WHERE}: bits must be in 1..8, got {bits}")
    lo, hi = interval
    if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise ValueError(f"{_WHERE}: expected a finite interval (lo, hi) with lo < hi, got {interval}")
    if even and lo != -hi:
        raise ValueError(f"{_WHERE}: even=True needs an interval (-R, R), got {interval}")
    if not 2**bits <= cells <= _FINE:
        raise ValueError(
            f"{_WHERE}: cells must be in {2**bits}..{_FINE} for {bits} bits, got {cells}")


def _check_even(integrals: _Integrals, name: str) -> None:
    nodes = integrals.nodes
    functions = [integrals.derivative, integrals.weight or torch.ones_like]
    if not all(torch.allclose(f(-nodes), f(nodes), rtol=1e-9, atol=1e-12) for f in functions):
        raise ValueError(
            f"{_WHERE}: even=True indexes |x|, but the derivative of {name}, or the weight, is not "
            "even; leave it out")


def _check_tails(
        integrals: _Integrals, borders: Tensor, levels: Tensor, even: bool, name: str) -> None:
    """Beyond the interval the derivative must stay as near to the outermost level as within it."""
    nodes, lo, hi = integrals.nodes, integrals.nodes[0], integrals.nodes[-1]
    values = integrals.derivative(nodes)
    away = nodes.new_tensor([0.25, 0.5, 1.0, 2.0, 5.0, 20.0]) * (hi - lo)
    sides = [(hi + away, levels[-1], values[nodes >= borders[-1]])]
    if not even:
        sides.append((lo - away, levels[0], values[nodes <= borders[0]]))
    slack = 0.02 * (values.max() - values.min())
    for points, level, inside in sides:
        allowed = (inside - level).abs().max() + slack
        worst = (integrals.derivative(points) - level).abs().max()
        if not worst <= allowed:
            raise ValueError(
                f"{_WHERE}: beyond {float(lo):g}..{float(hi):g} the outermost levels continue, but "
                f"the derivative of {name} is up to {float(worst):.3g} away from {float(level):.3g} "
                "there; widen interval, or pass check_tails=False if no input can lie beyond it")
