"""The one call: a width for every saved tensor, within a budget of bytes."""

import fnmatch
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from brevitas_bp.allocate.budget import greedy, lower_bound, optimal, total
from brevitas_bp.allocate.profile import LossFn, Profile
from brevitas_bp.allocate.sensitivity import Sensitivity, estimator
from brevitas_bp.backward.explain import mib, table
from brevitas_bp.backward.planned import Candidate
from brevitas_bp.backward.wrapper import QuantBackwardWrapper
from brevitas_bp.errors import InfeasibleBudgetError, UnknownNameError, nearest
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic

Method = Literal["optimal", "greedy"]
CANDIDATES = (0.25, 0.5, 1, "2avg2", 2, 3, 4, 6, 8, "exact")

_WHERE = "brevitas_bp.plan_bit_widths"
_METHODS = {"optimal": optimal, "greedy": greedy}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class PlannedTensor:
    """Tensors that get one width.

    Attributes:
        sites: their names: "module:operation:what it is to the operation".
        elements: that are stored.
        exact_bytes: of the tensors as they are.
        reaches: how far a rounding goes: "weight", "norm" or "all".
        options: candidate -> (bytes, expected squared error of the gradient).
        chosen: the candidate.
    """

    sites: tuple[str, ...]
    elements: int
    exact_bytes: int
    reaches: str
    options: dict[str, tuple[float, float]]
    chosen: str

    @property
    def stored_bytes(self) -> float:
        """Bytes as chosen."""
        return self.options[self.chosen][0]

    @property
    def error(self) -> float:
        """Expected squared error of the gradient, as chosen."""
        return self.options[self.chosen][1]


@dataclass(frozen=True)
class BitPlan:
    """Widths for the saved tensors of a network. ``print`` it, edit it, save it, wrap with it.

    Attributes:
        tensors: what has a width, in the order of the forward pass.
        fixed_bytes: what is saved beside: exact tensors, masks, indices.
        exact_bytes: what plain autograd saves.
        gradient_energy: ``|g|^2`` of the exact gradient, the unit of errors.
        sensitivity: the estimator.
        method: the solver, or "edited".
        passes: backward passes that planning took.
        seconds: that it took.
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
        """Name of a saved tensor -> candidate: what the wrapper reads."""
        return {site: t.chosen for t in self.tensors for site in t.sites}

    @property
    def stored_bytes(self) -> float:
        """All bytes that a forward pass keeps for backward, as planned."""
        return self.fixed_bytes + sum(t.stored_bytes for t in self.tensors)

    @property
    def average_bits(self) -> float:
        """Stored bits for each element that has a width, metadata and padding counted."""
        return 8 * sum(t.stored_bytes for t in self.tensors) / sum(t.elements for t in self.tensors)

    @property
    def error(self) -> float:
        """Expected ``|g~ - g|^2 / |g|^2`` of the whole gradient."""
        return sum(t.error for t in self.tensors) / (self.gradient_energy or 1.0)

    def within(
            self, *, budget: int | str | None = None, average_bits: float | None = None,
            method: Method = "optimal") -> "BitPlan":
        """The best plan for another budget, from the same measurements.

        Raises:
            InfeasibleBudgetError: the smallest widths take more; says by how much.
            ValueError: not exactly one of ``budget`` and ``average_bits``.
        """
        limit = _limit(self, budget, average_bits)
        if method not in _METHODS:
            raise UnknownNameError(
                f"{_WHERE}: method must be one of {sorted(_METHODS)}, got {method!r}"
                f"{nearest(str(method), _METHODS)}")
        names = [list(t.options) for t in self.tensors]
        sizes = [[t.options[n][0] for n in row] for t, row in zip(self.tensors, names)]
        costs = [[t.options[n][1] for n in row] for t, row in zip(self.tensors, names)]
        _check_budget(self, sizes, limit)
        chosen = _METHODS[method](costs, sizes, limit)
        return replace(
            self, method=method, tensors=tuple(
                replace(t, chosen=row[j]) for t, row, j in zip(self.tensors, names, chosen)))

    def gap(self) -> float:
        """How much lower the error might be within the same bytes, at most; 0 is proven best.

        As a share of the error, from the bound that allows fractions of options.
        """
        sizes = [[o[0] for o in t.options.values()] for t in self.tensors]
        costs = [[o[1] for o in t.options.values()] for t in self.tensors]
        chosen = [list(t.options).index(t.chosen) for t in self.tensors]
        cost = total(costs, chosen)
        bound = lower_bound(costs, sizes, total(sizes, chosen))
        return (cost - bound) / cost if cost > 0 else 0.0

    def with_bits(self, pattern: str, candidate: Candidate | float | str) -> "BitPlan":
        """The plan with another candidate for every tensor of which a name matches the glob.

        Raises:
            UnknownNameError: the glob matches nothing.
            ValueError: a candidate that was not measured.
        """
        name = str(Candidate.parse(candidate))
        matching = [
            t for t in self.tensors if any(fnmatch.fnmatchcase(s, pattern) for s in t.sites)]
        if not matching:
            sites = [s for t in self.tensors for s in t.sites]
            raise UnknownNameError(
                f"brevitas_bp.BitPlan.with_bits: {pattern!r} matches none of the {len(sites)} saved "
                f"tensors{nearest(pattern, sites)}")
        for t in matching:
            if name not in t.options:
                raise ValueError(
                    f"brevitas_bp.BitPlan.with_bits: {name!r} was not measured for {t.sites[0]!r}, only "
                    f"{list(t.options)}; plan with candidates that contain it")
        return replace(self, method="edited", tensors=tuple(
            replace(t, chosen=name) if t in matching else t for t in self.tensors))

    def overrides(self) -> dict[str, str]:
        """Module name -> candidate, as ``overrides`` of a wrapper; the widest of several in a module.

        Overrides leave it to the policy which tensors get more bits than configured: where those of
        the plan are to hold, pass ``policy=OpAware(multiplier_bits=1)``.
        """
        found: dict[str, Candidate] = {}
        for site, chosen in self.choices.items():
            module, candidate = site.partition(":")[0], Candidate.parse(chosen)
            before = found.get(module, candidate)
            found[module] = max(before, candidate, key=lambda c: c.nominal_bits)
        return {module: str(c) for module, c in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"format": 1, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BitPlan":
        """The plan of :meth:`to_dict`, perhaps edited: ``chosen`` of each tensor.

        Raises:
            ValueError: these are no values of a plan, or a tensor has a candidate without a measurement.
        """
        try:
            values = dict(values)
            if values.pop("format") != 1:
                raise ValueError("format is not 1")
            tensors = [PlannedTensor(**{
                **t, "sites": tuple(t["sites"]),
                "options": {k: (size, error) for k, (size, error) in t["options"].items()},
                "chosen": str(Candidate.parse(t["chosen"]))}) for t in values.pop("tensors")]
            plan = cls(tensors=tuple(tensors), **values)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"brevitas_bp.BitPlan: this is no plan ({error!r}); write plans with save()") from error
        for t in plan.tensors:
            if t.chosen not in t.options:
                raise ValueError(
                    f"brevitas_bp.BitPlan: the plan chooses {t.chosen!r} for {t.sites[0]!r}, which was "
                    f"not measured; there are {list(t.options)}")
        return plan

    def save(self, path: str | Path) -> None:
        """Writes JSON, atomically. Widths may be edited by hand: ``chosen`` of each tensor."""
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> "BitPlan":
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: the file is no plan; see :meth:`from_dict`.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"brevitas_bp.BitPlan.load: {path}: {error}") from error

    def __str__(self) -> str:
        unit = self.gradient_energy or 1.0
        lines = [("tensor", "reaches", "bits", "exact MiB", "stored MiB", "error")]
        for t in self.tensors:
            more = f" (+{len(t.sites) - 1})" if len(t.sites) > 1 else ""
            lines.append((
                next(iter(t.sites)).removesuffix(":argument 0") + more, t.reaches, t.chosen,
                mib(t.exact_bytes), mib(round(t.stored_bytes)), f"{t.error / unit:.2e}"))
        lines.append(("exact, masks, indices", "", "", "", mib(self.fixed_bytes), "0"))
        lines.append((
            "total", "", f"{self.average_bits:.2f}", mib(self.exact_bytes),
            mib(round(self.stored_bytes)), f"{self.error:.2e}"))
        return "\n".join([
            table(lines, left=2, total=True),
            f"{self.exact_bytes / self.stored_bytes:.2f} times fewer bytes; {self.method}, at most "
            f"{self.gap():.1%} above the least error; {self.sensitivity} sensitivity, {self.passes} "
            f"backward passes, {self.seconds:.0f} s"])


def plan_bit_widths(
        model: nn.Module,
        batch: Any,
        loss_fn: LossFn,
        *,
        budget: int | str | None = None,
        average_bits: float | None = None,
        candidates: Sequence[Candidate | float | str] = CANDIDATES,
        sensitivity: str | Sensitivity = "empirical",
        method: Method = "optimal",
        act_quant: Any = ShiftedUint2DynamicActPerBucketFloatStochastic,
        seed: int = 0,
        progress: bool | Callable[[str], None] = False,
        **wrapper_options: Any) -> BitPlan:
    """Chooses a width for every saved tensor: least error of the gradient within a budget of bytes.

    Forward runs once, backward as often as the estimator needs; buffers, random states and ``.grad`` are
    afterwards as before. Memory is that of plain autograd twice, so a small batch will do: widths
    carry over, bytes grow with the batch.

    Args:
        model: a network, or one that is wrapped: then its own settings count.
        batch: handed to ``loss_fn``.
        loss_fn: ``(model, batch) -> scalar loss``.
        budget: all bytes that forward may keep for backward of this batch, such as 400_000_000, "400MB",
            "381MiB", or "5%" of what plain autograd keeps; what is kept exact counts.
        average_bits: instead, bits for each element that has a width, metadata counted.
        candidates: widths in 1..8, "exact", width and bucket size such as "2@64", or 2-bit means of
            neighbours: 0.5, 0.25, "2avg2" (Average Quantization; only where its bias stays in the
            gradient of one weight).
        sensitivity: "empirical" (one or two backward passes for each tensor that reaches further
        than its own
            weight), "closed_form" (one in all), "gradient_norms", or a
            :class:`~brevitas_bp.allocate.sensitivity.Sensitivity`.
        method: "optimal" (integer programming; needs SciPy) or "greedy".
        act_quant: quantizer whose rounding, bucket size and metadata all candidates share.
        seed: of the roundings.
        progress: True shows a bar on stderr (with rich, if installed); a function is told in words what
            it costs, beforehand, and then how far it is.
        **wrapper_options: further arguments of :class:`QuantBackwardWrapper`, for a network that is not
            wrapped: ``policy``, ``overrides``, ``bucket_size``, ...

    Raises:
        InfeasibleBudgetError: the smallest widths take more than the budget; says by how much.
        ValueError: an argument out of range, or a loss that is no scalar.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        >>> plan = plan_bit_widths(
        ...     net, torch.randn(64, 64), lambda model, x: model(x).square().mean(), average_bits=3)
        >>> plan.average_bits <= 3
        True
        >>> model = QuantBackwardWrapper(net, plan=plan)
    """
    if (budget is None) == (average_bits is None):
        raise ValueError(
            f"{_WHERE}: exactly one of budget and average_bits must be given, got budget={budget!r} and "
            f"average_bits={average_bits!r}")
    chosen = _check_candidates(candidates)
    estimate = estimator(sensitivity)
    wrapped = _wrapped(model, act_quant, wrapper_options)
    start = time.perf_counter()
    profile = Profile(wrapped, batch, loss_fn, seed)
    try:
        passes = estimate.passes(profile, chosen)
        before = time.perf_counter()
        profile.exact  # noqa: B018  (timed: it tells what is to come)
        cost = (
            f"{len(profile.groups)} tensors, {passes} backward passes of about "
            f"{time.perf_counter() - before:.2g} s")
        with _progress(progress, cost, passes) as tick:
            errors = estimate.errors(profile, chosen, tick)
        plan = BitPlan(
            tuple(_options(profile, i, chosen, row) for i, row in enumerate(errors)),
            profile.fixed_bytes, profile.exact_bytes,
            sum(float(g.double().square().sum()) for g in profile.exact if g is not None),
            estimate.name, method, passes, time.perf_counter() - start)
    finally:
        profile.release()
    return plan.within(budget=budget, average_bits=average_bits, method=method)


def _wrapped(model: nn.Module, act_quant: Any, options: dict[str, Any]) -> QuantBackwardWrapper:
    if not isinstance(model, QuantBackwardWrapper):
        return QuantBackwardWrapper(model, act_quant, **options)
    if options or act_quant is not ShiftedUint2DynamicActPerBucketFloatStochastic:
        raise TypeError(
            f"{_WHERE}: the model is wrapped already, so the settings "
            f"{sorted(options) or ['act_quant']} would do nothing; change those of the wrapper, "
            "or pass wrapper.module")
    return model


def _check_candidates(given: Sequence[Candidate | float | str]) -> list[Candidate]:
    found = list(dict.fromkeys(Candidate.parse(c) for c in given))
    if len(found) < 2:
        raise ValueError(f"{_WHERE}: candidates must hold two or more widths, got {list(given)}")
    return found


def _options(
        profile: Profile, index: int, candidates: list[Candidate],
        errors: Sequence[float]) -> PlannedTensor:
    """The candidates worth having: none that another beats in bytes and error."""
    group = profile.groups[index]
    # The bias of averages must not reach other gradients than that of the tensor's own weight.
    all_options = {
        str(c): (profile.stored_bytes(group, c), error) for c, error in zip(candidates, errors)
        if c.average_size == 1 or group.parameters is not None}
    options: dict[str, tuple[float, float]] = {}
    for name, option in sorted(all_options.items(), key=lambda item: item[1]):
        if not options or option[1] < min(o[1] for o in options.values()):
            options[name] = option
    return PlannedTensor(
        tuple(group.sites), group.numel, group.exact_bytes, group.reaches, options,
        next(iter(options)))


def _limit(plan: BitPlan, budget: int | str | None, average_bits: float | None) -> float:
    """Bytes for the tensors that have a width."""
    if (budget is None) == (average_bits is None):
        raise ValueError(f"{_WHERE}: exactly one of budget and average_bits must be given")
    if budget is not None:
        return parse_bytes(budget, plan.exact_bytes) - plan.fixed_bytes
    assert average_bits is not None
    return average_bits * sum(t.elements for t in plan.tensors) / 8


def _check_budget(plan: BitPlan, sizes: list[list[float]], limit: float) -> None:
    least = sum(min(row) for row in sizes)
    if least > limit:
        raise InfeasibleBudgetError(
            f"{_WHERE}: the smallest widths take {mib(round(least))} MiB, "
            f"{mib(round(least - limit))} MiB more than the budget leaves for them; "
            f"{mib(plan.fixed_bytes)} MiB beside them are kept exact or as masks "
            "(print(model.explain()) shows where). Allow smaller candidates, change the policy, or "
            "raise the budget")


def parse_bytes(given: int | str, whole: int = 0) -> int:
    """A number of bytes, or text such as "400MB", "1.5 GiB", "5%" of ``whole``.

    Raises:
        ValueError: neither.

    >>> parse_bytes("400MB"), parse_bytes("1.5 GiB"), parse_bytes("5%", 2000)
    (400000000, 1610612736, 100)
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*|%)", str(given).strip())
    if match is None or match[2].upper() not in (*_UNITS, "%"):
        raise ValueError(
            f"{_WHERE}: budget must be bytes, such as 400_000_000, '400MB', '381MiB' or '5%', got "
            f"{given!r}")
    unit = whole / 100 if match[2] == "%" else _UNITS[match[2].upper()]
    return int(float(match[1]) * unit)


@contextmanager
def _progress(
        shown: bool | Callable[[str], None], cost: str, passes: int) -> Iterator[Callable[[], None]]:
    """A function to call after each backward pass."""
    if callable(shown):
        yield from _told(shown, cost, passes)
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda: None
        return
    with Progress(console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(f"sensitivity: {cost}", total=passes)
        yield lambda: bar.advance(task)


def _told(tell: Callable[[str], None], cost: str, passes: int) -> Iterator[Callable[[], None]]:
    tell(f"sensitivity: {cost}")
    done = iter(range(1, passes + 1))

    def tick() -> None:
        tell(f"{next(done)} of {passes} backward passes")

    yield tick
