"""Optimal piecewise-constant derivatives: the tables of Few-Bit Backward.

The backward pass of ``y = f(x)`` multiplies by ``f'(x)``. A table cuts the line into ``2**bits``
intervals with one level each, so only the index of an interval has to be saved for ``x``. The table
minimises

    ``sum_i int_{c_i}^{c_{i+1}} (f'(x) - y_i)**2 w(x) dx``

The conditions for the minimum are ``y_i = int f' w / int w`` over the interval and
``f'(c_i) = (y_{i-1} + y_i) / 2``. :mod:`brevitas_bp.activations.fitting` searches until both conditions
hold. Other grids find the same tables up to 6 bits. At 7 and 8 bits, a grid cell is no longer small
compared to an interval, and errors may be 0.2 % above the optimum.

Source: Novikov et al., "Few-bit backward: quantized gradients of activation functions for memory
footprint reduction", 2022. Its published tables were fitted by descent, and several are local optima.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from brevitas_bp.activations.fitting import FINE, Function, Integrals, optimal_borders
from brevitas_bp.activations.functions import ACTIVATIONS
from brevitas_bp.errors import UnknownNameError, nearest

_WHERE = "brevitas_bp.activations.few_bit"
# Processors differ in the last bits of exponentials; tables must not differ. These are the digits of
# borders relative to the width of the interval (the error is flat around a border), and the digits of
# levels relative to the largest level.
_BORDER_DIGITS, _LEVEL_DIGITS = 7, 11


@dataclass(frozen=True)
class FewBitTable:
    """A derivative with one constant level per interval.

    Attributes:
        name: name of the function, for reports.
        borders: K - 1 inner borders, ascending. ``x`` equal to a border is in the lower interval.
        levels: K derivatives. The outermost two continue to infinity.
        even: the intervals are those of ``|x|``.
        error: integral of the squared error over the whole fitted interval, weighted if the fit was
            weighted; None if unknown.

    Raises:
        ValueError: the number of levels is not in 2..256, or the borders do not fit the levels.

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
        """The bits of an index."""
        return (len(self.levels) - 1).bit_length()

    def derivative(self, x: Tensor) -> Tensor:
        """Returns the level of every element, in the dtype of ``x``; NaN for NaN."""
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
    """Finds the optimal table of ``2**bits`` levels for a derivative on an interval.

    If several tables are equally good (mirror images), this function takes the table whose interval
    around zero has an odd index. So every machine finds the same table.

    Args:
        function: one of :func:`named_functions`, or the derivative itself, elementwise on float64
            tensors.
        bits: 1..8.
        interval: the interval on which the error counts. The outermost levels continue beyond it.
        cells: cells of the first grid, more where the derivative varies. Cost: O(2**bits * cells**2).
        weight: density of the inputs, not necessarily normalised; uniform by default.
        even: indexes ``|x|``, which resolves twice as finely; for even derivatives.
        breaks: points at which your own derivative jumps; named functions know theirs.
        check_tails: refuses a derivative that leaves the outermost levels beyond the interval. Switch
            it off only if no input can lie there.
        name: name for reports; by default the name of the function.
        parameters: parameters of the named function, such as ``alpha`` of ELU.

    Raises:
        UnknownNameError: a name or parameter is not known.
        ValueError: a setting is out of range; ``even`` is set and the derivative is not even; the
            derivative is not finite, or is far from the outermost levels beyond the interval
            (``x**2``, periodic derivatives).

    >>> fit_few_bit_table("gelu", 1).borders
    (0.0,)
    """
    derivative, own_breaks, own_name = _resolve(function, parameters)
    _check(bits, interval, cells, even)
    lo, hi = (0.0, float(interval[1])) if even else interval
    inner = [b for b in (*breaks, *own_breaks) if lo < b < hi]
    # The fit makes a few small float64 tensors here, whatever the user's default device is.
    with torch.device("cpu"):
        integrals = Integrals(derivative, weight, lo, hi, inner)
        if even:
            _check_even(integrals, own_name)
        borders = _rounded(optimal_borders(integrals, 2**bits, cells, inner), hi - lo, _BORDER_DIGITS)
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
    """Calls :func:`fit_few_bit_table` for a named function; solves at first use, then caches.

    A fit takes a few hundredths of a second up to 4 bits, and under a second at 8 bits. ``settings``
    are the other settings of :func:`fit_few_bit_table`, and the parameters of the named function.

    >>> few_bit_table("silu", 3) is few_bit_table("silu", 3)
    True
    """
    return fit_few_bit_table(name, bits, interval=interval, even=even, **settings)


def named_functions() -> list[str]:
    """Returns the names of the functions that have few-bit tables."""
    return [name for name, activation in ACTIVATIONS.items() if activation.derivative is not None]


def _rounded(x: Tensor, size: float, digits: int) -> Tensor:
    """Rounds values of at most order ``size`` to ``digits`` digits after the first digit of ``size``."""
    if size == 0:
        return x
    digits -= math.floor(math.log10(size))
    return torch.tensor([round(v, digits) for v in x.tolist()], dtype=torch.float64)


def _resolve(
        function: str | Function,
        parameters: dict[str, float]) -> tuple[Function, tuple[float, ...], str]:
    """Returns the derivative, the points at which it jumps, and its name."""
    if not isinstance(function, str):
        if parameters:
            raise TypeError(
                f"{_WHERE}: {sorted(parameters)} would do nothing, because a derivative given as a "
                "function takes no parameters here; bind them with functools.partial")
        return function, (), getattr(function, "__name__", "function")
    _check_name("function", function, named_functions())
    activation = ACTIVATIONS[function]
    defaults = activation.defaults()
    for parameter in parameters:
        _check_name(f"parameter of {function}", parameter, defaults)
    shown = ", ".join(
        f"{key}={value:g}" for key, value in parameters.items() if value != defaults[key])
    return (
        partial(activation.at, **parameters), activation.breaks(**(defaults | parameters)),
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
    if not 2**bits <= cells <= FINE:
        raise ValueError(
            f"{_WHERE}: cells must be in {2**bits}..{FINE} for {bits} bits, got {cells}")


def _check_even(integrals: Integrals, name: str) -> None:
    nodes = integrals.nodes
    functions = [integrals.derivative, integrals.weight or torch.ones_like]
    if not all(torch.allclose(f(-nodes), f(nodes), rtol=1e-9, atol=1e-12) for f in functions):
        raise ValueError(
            f"{_WHERE}: even=True indexes |x|, but the derivative of {name}, or the weight, is not "
            "even; leave even=True out")


def _check_tails(
        integrals: Integrals, borders: Tensor, levels: Tensor, even: bool, name: str) -> None:
    """Raises if the derivative is further from its outermost levels beyond the interval than within."""
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
