"""Saved tensors of a plan, and those of them whose candidates must be chosen together.

NOTE [ Errors that depend on two widths ]
1. The output of SiLU or GELU is stored given the derivative of the function, see
   NOTE [ Given what is stored already ]. With fewer bits, the derivative tells less about the output,
   and the rounding error of the output grows.
2. Each candidate of the derivative multiplies the error of the output by a factor. For codes of each
   element, this factor is the same whatever their width: the error is proportional to the energy of
   what is stored. Averages have factors of their own.
3. So a derivative and the outputs that are stored given it form a bundle. Its options are the
   combinations of their candidates that no other combination beats in both bytes and error. If there
   are too many, only those on the lower convex hull are kept.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from brevitas_bp.allocate.budget import lower_hull, slope, worth_having

# Combinations of two lists of options that are all tried.
_MOST = 2048


@dataclass(frozen=True)
class PlannedTensor:
    """Saved tensors that share one candidate (a group).

    Attributes:
        sites: names of the tensors: "module:operation:role of the tensor in the operation".
        elements: number of stored elements.
        exact_bytes: bytes of the tensors uncompressed.
        reach: how far a rounding error travels: "weight", "sum", "norm" or "all".
        options: candidate -> (bytes, expected squared error of the gradient).
        chosen: the chosen candidate.
        given: a name of the derivative that the tensors are stored given; None: no derivative.
        growth: own candidate if it averages, else "" -> candidate of that derivative -> the factor by
            which the error in ``options`` grows.
    """

    sites: tuple[str, ...]
    elements: int
    exact_bytes: int
    reach: str
    options: dict[str, tuple[float, float]]
    chosen: str
    given: str | None = None
    growth: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def stored_bytes(self) -> float:
        """Bytes with the chosen candidate."""
        return self.options[self.chosen][0]

    def error_beside(self, choices: Mapping[str, str]) -> float:
        """Returns the expected squared error of the gradient with the chosen candidate.

        Args:
            choices: name of a tensor -> its chosen candidate.
        """
        error = self.options[self.chosen][1]
        # No factor times an error of zero: the factor may be infinite.
        return error * self.growth_of(self.chosen, choices.get(self.given or "")) if error else 0.0

    def growth_of(self, own: str, candidate: str | None) -> float:
        """Returns the factor by which the error of ``own`` grows if the derivative has a candidate."""
        factors = self.growth.get(own, self.growth.get("", {}))
        return 1.0 if candidate is None else factors.get(candidate, 1.0)


class Option(NamedTuple):
    """A combination of the candidates of a bundle.

    Attributes:
        size: bytes.
        error: expected squared error of the gradient.
        chosen: index of a tensor -> its candidate.
    """

    size: float
    error: float
    chosen: dict[int, str]


def bundled(tensors: Sequence[PlannedTensor]) -> list[list[Option]]:
    """Returns the options of each bundle that are worth having, by size.

    Most tensors are bundles of their own.
    """
    place = {site: i for i, t in enumerate(tensors) for site in t.sites}
    members: defaultdict[int, list[int]] = defaultdict(list)
    for i, t in enumerate(tensors):
        first = place.get(t.given or "", i)
        # A derivative is stored given nothing.
        members[i if tensors[first].given is not None else first].append(i)
    return [_options_of(tensors, first, members[first]) for first in sorted(members)]


def _options_of(
        tensors: Sequence[PlannedTensor], first: int, members: Sequence[int]) -> list[Option]:
    options: list[Option] = []
    for name, (size, error) in tensors[first].options.items():
        combined = [Option(size, error, {first: name})]
        for i in members:
            if i != first:
                own = _worth_having([
                    Option(s, e * tensors[i].growth_of(n, name) if e else 0.0, {i: n})
                    for n, (s, e) in tensors[i].options.items()])
                combined = _combined(combined, own)
        options += combined
    return _worth_having(options)


def _combined(first: list[Option], second: list[Option]) -> list[Option]:
    """Returns the combinations of options that are worth having; of many, those on the convex hull."""
    if len(first) * len(second) <= _MOST:
        return _worth_having([_sum(a, b) for a, b in itertools.product(first, second)])
    a, b = _convex(first), _convex(second)
    steps = sorted([(rate, 0) for rate in _slopes(a)] + [(rate, 1) for rate in _slopes(b)])
    # The hull of sums follows both hulls, the steeper step first.
    places, found = [0, 0], [_sum(a[0], b[0])]
    for _, which in steps:
        places[which] += 1
        found.append(_sum(a[places[0]], b[places[1]]))
    return found


def _sum(a: Option, b: Option) -> Option:
    return Option(a.size + b.size, a.error + b.error, a.chosen | b.chosen)


def _slopes(options: Sequence[Option]) -> list[float]:
    """Returns the error that the step from each option to the next adds for each byte."""
    errors, sizes = [o.error for o in options], [o.size for o in options]
    return [slope(errors, sizes, i, i + 1) for i in range(len(options) - 1)]


def _convex(options: Sequence[Option]) -> list[Option]:
    return [options[i] for i in lower_hull([o.error for o in options], [o.size for o in options])]


def _worth_having(options: Sequence[Option]) -> list[Option]:
    return [options[i] for i in worth_having([o.error for o in options], [o.size for o in options])]
