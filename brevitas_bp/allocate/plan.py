"""Bit plans: the candidate chosen for each site. Print, edit or save a plan, or fit it to a budget."""

import fnmatch
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from brevitas_bp.allocate.budget import lower_bound, optimal, require_scipy, thrifty
from brevitas_bp.allocate.bundles import Option, PlannedTensor, bundled
from brevitas_bp.codec.candidate import Candidate
from brevitas_bp.errors import InfeasibleBudgetError, UnknownNameError, nearest
from brevitas_bp.text import mib, table

Method = Literal["optimal", "greedy"]

_WHERE = "brevitas_bp.plan_bit_widths"
# Measured: the errors of tensors add up while their sum is below this share of the gradient's energy.
_COMPOUNDS = 0.5
_METHODS = {"optimal": optimal, "greedy": thrifty}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class BitPlan:
    """The chosen candidate of each saved tensor that a plan may round.

    Print it, edit it, save it, or pass it to a wrapper.

    Attributes:
        tensors: these tensors, in the order of the forward pass.
        fixed_bytes: bytes of all other saved tensors: exact tensors, masks, indices.
        exact_bytes: bytes that plain autograd saves.
        gradient_energy: ``|g|^2`` of the exact gradient, the unit of errors.
        sensitivity: name of the estimator.
        method: the solver, or "edited".
        passes: number of backward passes that planning took.
        seconds: time that planning took.
    """

    tensors: tuple[PlannedTensor, ...]
    fixed_bytes: int
    exact_bytes: int
    gradient_energy: float
    sensitivity: str
    method: str
    passes: int
    seconds: float

    @property
    def choices(self) -> dict[str, str]:
        """Name of a saved tensor -> chosen candidate. The wrapper reads these names."""
        return {site: t.chosen for t in self.tensors for site in t.sites}

    @property
    def stored_bytes(self) -> float:
        """All bytes that a forward pass keeps for backward under this plan."""
        return self.fixed_bytes + sum(t.stored_bytes for t in self.tensors)

    @property
    def average_bits(self) -> float:
        """Stored bits per element of ``tensors``, including metadata and padding."""
        return 8 * sum(t.stored_bytes for t in self.tensors) / sum(t.elements for t in self.tensors)

    @property
    def error(self) -> float:
        """Expected squared error ``|g~ - g|^2 / |g|^2`` of the whole gradient."""
        return sum(self._errors) / (self.gradient_energy or 1.0)

    @property
    def _errors(self) -> list[float]:
        choices = self.choices
        return [t.error_beside(choices) for t in self.tensors]

    def within(
            self, *, budget: int | str | None = None, average_bits: float | None = None,
            method: Method = "optimal") -> "BitPlan":
        """Returns the best plan for another budget, from the same measurements.

        Raises:
            InfeasibleBudgetError: the smallest widths take more; the message says how much.
            ValueError: not exactly one of ``budget`` and ``average_bits`` is given.
        """
        check_budget(budget, average_bits)
        check_method(method)
        limit = _limit(self, budget, average_bits)
        options = bundled(self.tensors)
        costs, sizes = _tables(options)
        _check_feasible(self, sizes, limit, average_bits is None)
        chosen: dict[int, str] = {}
        for row, j in zip(options, _METHODS[method](costs, sizes, limit)):
            chosen |= row[j].chosen
        return replace(self, method=method, tensors=tuple(
            replace(t, chosen=chosen[i]) for i, t in enumerate(self.tensors)))

    def gap(self) -> float:
        """Returns an upper bound on how much lower the error could be within the same bytes.

        The bound is a share of the error. It comes from a relaxation that allows fractions of options. A
        bound of 0 proves that the plan is the best.
        """
        cost = sum(self._errors)
        bound = lower_bound(
            *_tables(bundled(self.tensors)), sum(t.stored_bytes for t in self.tensors))
        return max(0.0, cost - bound) / cost if cost > 0 else 0.0

    def with_bits(self, pattern: str, candidate: Candidate | float | str) -> "BitPlan":
        """Returns the plan with another candidate for every tensor with a name that matches the glob.

        Raises:
            UnknownNameError: the glob matches nothing.
            ValueError: the candidate was not measured.
        """
        name = str(Candidate.parse(candidate))
        matching = [
            t for t in self.tensors if any(fnmatch.fnmatchcase(s, pattern) for s in t.sites)]
        if not matching:
            sites = [s for t in self.tensors for s in t.sites]
            raise UnknownNameError(
                f"brevitas_bp.allocate.BitPlan.with_bits: {pattern!r} matches none of the "
                f"{len(sites)} saved tensors{nearest(pattern, sites)}")
        for t in matching:
            if name not in t.options:
                raise ValueError(
                    f"brevitas_bp.allocate.BitPlan.with_bits: {name!r} was not measured for "
                    f"{t.sites[0]!r}, only {list(t.options)}; plan with candidates that contain it")
        return replace(self, method="edited", tensors=tuple(
            replace(t, chosen=name) if t in matching else t for t in self.tensors))

    def only(self, candidates: Sequence[Candidate | float | str]) -> "BitPlan":
        """Returns the plan with fewer candidates to choose from.

        Each tensor has the first of its remaining candidates until :meth:`within` chooses again.

        Raises:
            ValueError: a tensor has none of the candidates.
        """
        kept = {str(Candidate.parse(c)) for c in candidates}
        tensors = []
        for t in self.tensors:
            options = {name: option for name, option in t.options.items() if name in kept}
            if not options:
                raise ValueError(
                    f"brevitas_bp.allocate.BitPlan.only: {t.sites[0]!r} has none of {sorted(kept)}, but "
                    f"{list(t.options)}; keep one of them")
            tensors.append(replace(t, options=options, chosen=next(iter(options))))
        return replace(self, method="edited", tensors=tuple(tensors))

    def overrides(self) -> dict[str, str]:
        """Returns module name -> candidate, as ``overrides`` of a wrapper.

        A module with several candidates gets the widest. Inner modules come before the modules around
        them. "*" comes last and serves tensors that the root itself saves. With overrides, the policy
        still decides which tensors get more bits than configured. To apply the plan's widths, pass
        ``policy=OpAware(multiplier_bits=1)``.
        """
        found: dict[str, Candidate] = {}
        for site, chosen in self.choices.items():
            module, candidate = site.partition(":")[0], Candidate.parse(chosen)
            before = found.get(module, candidate)
            found[module] = max(before, candidate, key=lambda c: c.nominal_bits)
        deepest = sorted(found, key=lambda module: (not module, -module.count(".")))
        return {module or "*": str(found[module]) for module in deepest}

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return {"format": 1, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BitPlan":
        """Returns the plan of :meth:`to_dict`. ``chosen`` of each tensor may have been edited.

        Raises:
            ValueError: the values are no plan, or a tensor has a candidate that was not measured.
        """
        try:
            values = dict(values)
            if values.pop("format") != 1:
                raise ValueError("format is not 1")
            # Before 2026-12 a plan called this key "reaches".
            listed = [
                {"reach" if key == "reaches" else key: value for key, value in t.items()}
                for t in values.pop("tensors")]
            tensors = [PlannedTensor(**{
                **t, "sites": tuple(t["sites"]),
                "options": {k: (size, error) for k, (size, error) in t["options"].items()},
                "chosen": str(Candidate.parse(t["chosen"]))}) for t in listed]
            plan = cls(tensors=tuple(tensors), **values)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"brevitas_bp.allocate.BitPlan: this is no plan ({error!r}); write plans with save()"
            ) from error
        for t in plan.tensors:
            if t.chosen not in t.options:
                raise ValueError(
                    f"brevitas_bp.allocate.BitPlan: the plan chooses {t.chosen!r} for "
                    f"{t.sites[0]!r}, which was not measured; there are {list(t.options)}")
        return plan

    def save(self, path: str | Path) -> None:
        """Writes JSON, atomically. Widths may be edited by hand: ``chosen`` of each tensor."""
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> "BitPlan":
        """Reads a plan that :meth:`save` wrote.

        Raises:
            ValueError: the file is no plan; see :meth:`from_dict`.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"brevitas_bp.allocate.BitPlan.load: {path}: {error}") from error

    def __str__(self) -> str:
        unit = self.gradient_energy or 1.0
        lines = [("tensor", "reach", "bits", "exact MiB", "stored MiB", "error")]
        for t, error in zip(self.tensors, self._errors):
            more = f" (+{len(t.sites) - 1})" if len(t.sites) > 1 else ""
            lines.append((
                next(iter(t.sites)).removesuffix(":argument 0") + more, t.reach, t.chosen,
                mib(t.exact_bytes), mib(round(t.stored_bytes)), f"{error / unit:.2e}"))
        lines.append(("exact, masks, indices", "", "", "", mib(self.fixed_bytes), "0"))
        lines.append((
            "total", "", f"{self.average_bits:.2f}", mib(self.exact_bytes),
            mib(round(self.stored_bytes)), f"{self.error:.2e}"))
        compound = [] if self.error < _COMPOUNDS else [
            "errors of this size multiply each other: expect more than their sum"]
        return "\n".join([
            table(lines, left=2, total=True), *compound,
            f"{self.exact_bytes / self.stored_bytes:.2f} times fewer bytes; {self.method}, at most "
            f"{self.gap():.1%} above the least error; {self.sensitivity} sensitivity, {self.passes} "
            f"backward passes, {self.seconds:.0f} s"])


def check_budget(budget: int | str | None, average_bits: float | None) -> None:
    """Checks that exactly one of the two is given, and that text is a size.

    Raises:
        ValueError: it is not; the message says what is expected.
    """
    if (budget is None) == (average_bits is None):
        raise ValueError(
            f"{_WHERE}: exactly one of budget and average_bits must be given, got budget={budget!r} and "
            f"average_bits={average_bits!r}")
    if budget is not None:
        parse_bytes(budget, 1)


def check_method(method: str) -> None:
    """Refuses a solver that is unknown or not installed.

    Raises:
        UnknownNameError: no solver has that name.
        ImportError: the solver needs SciPy.
    """
    if method not in _METHODS:
        raise UnknownNameError(
            f"{_WHERE}: method must be one of {sorted(_METHODS)}, got {method!r}"
            f"{nearest(str(method), _METHODS)}")
    if method == "optimal":
        require_scipy()


def _tables(options: list[list[Option]]) -> tuple[list[list[float]], list[list[float]]]:
    """Returns errors and sizes of options."""
    return [[o.error for o in row] for row in options], [[o.size for o in row] for row in options]


def _limit(plan: BitPlan, budget: int | str | None, average_bits: float | None) -> float:
    """Returns the bytes that the budget leaves for the tensors of a plan."""
    if budget is not None:
        return parse_bytes(budget, plan.exact_bytes) - plan.fixed_bytes
    assert average_bits is not None
    return average_bits * sum(t.elements for t in plan.tensors) / 8


def _check_feasible(
        plan: BitPlan, sizes: list[list[float]], limit: float, in_bytes: bool) -> None:
    least = sum(min(row) for row in sizes)
    if least <= limit:
        return
    beside = (
        f"; {plan.fixed_bytes:,} further bytes are kept exact or as masks (explain() of the wrapped "
        "model shows where, after a forward pass)") if in_bytes else ""
    raise InfeasibleBudgetError(
        f"{_WHERE}: the smallest widths take {least:,.0f} bytes, {least - limit:,.0f} bytes more "
        f"than the budget leaves for them{beside}. Allow smaller candidates, change the policy, or "
        "raise the budget")


def parse_bytes(given: int | str, whole: int = 0) -> int:
    """Returns a number of bytes, from a number or text such as "400MB", "1.5 GiB", "5%" of ``whole``.

    Raises:
        ValueError: it is neither.

    >>> parse_bytes("400MB"), parse_bytes("1.5 GiB"), parse_bytes("5%", 2000)
    (400000000, 1610612736, 100)
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*|%)", str(given).strip())
    if match is None or match[2].upper() not in (*_UNITS, "%"):
        raise ValueError(
            f"{_WHERE}: budget must be bytes, such as 400_000_000, '400MB', '381MiB' or '5%', got "
            f"{given!r}")
    number = float(match[1])
    if match[2] == "%" and number > 100:
        raise ValueError(
            f"{_WHERE}: budget must be at most '100%' of what plain autograd keeps, got {given!r}")
    if not match[2] and number != int(number):
        raise ValueError(
            f"{_WHERE}: budget must be a whole number of bytes, got {given!r}; a part of what plain "
            f"autograd keeps is '{100 * number:g}%'")
    return int(number * (whole / 100 if match[2] == "%" else _UNITS[match[2].upper()]))


