"""Measures sensitivities and chooses a width for every saved tensor within a budget, in one call."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from brevitas_bp.allocate.bundles import PlannedTensor
from brevitas_bp.allocate.plan import BitPlan, Method, check_budget, check_method
from brevitas_bp.allocate.probe import Group
from brevitas_bp.allocate.profile import LossFn, Profile
from brevitas_bp.allocate.sensitivity import Sensitivity, estimator
from brevitas_bp.backward.seam import wrappers_in
from brevitas_bp.backward.wrapper import QuantBackwardWrapper
from brevitas_bp.codec import ActQuant
from brevitas_bp.codec.candidate import Candidate
from brevitas_bp.quant import RotatedNormal2DynamicActPerBucketFloat

CANDIDATES = (0.25, 0.5, 1, "2avg2", 2, 3, 4, 5, 6, 8, "exact")

_WHERE = "brevitas_bp.plan_bit_widths"
_REFERENCE = Candidate(2)
# Share of the gradient's energy per unit of squared distance, below any error that is measured.
_UNSEEN = 1e-12


def plan_bit_widths(
        model: nn.Module,
        batch: Any,
        loss_fn: LossFn,
        *,
        budget: int | str | None = None,
        average_bits: float | None = None,
        candidates: Sequence[Candidate | float | str] | None = None,
        sensitivity: str | Sensitivity = "empirical",
        method: Method = "optimal",
        act_quant: ActQuant = RotatedNormal2DynamicActPerBucketFloat,
        seed: int = 0,
        progress: bool | Callable[[str], None] = False,
        **wrapper_options: Any) -> BitPlan:
    """Chooses a width for every saved tensor: least error of the gradient within a budget of bytes.

    The forward pass runs once. The backward pass runs as often as the estimator needs. Afterwards
    buffers, random states and ``.grad`` are as before. Memory is twice that of plain autograd. A small
    batch is enough: the widths suit larger batches too, and bytes grow with the batch.

    Args:
        model: a network, or a wrapped network. If it is wrapped, the wrapper's own settings count.
        batch: passed to ``loss_fn``.
        loss_fn: ``(model, batch) -> scalar loss``.
        budget: all bytes that the forward pass may keep for backward of this batch, such as 400_000_000,
            "400MB", "381MiB", or "5%" of what plain autograd keeps. Tensors that are kept exact count.
        average_bits: used instead of ``budget``: bits for each element that has a width, including
            metadata.
        candidates: widths in 1..8, "exact", width and bucket size such as "2@64", or 2-bit means of
            neighbours: 0.5, 0.25, "2avg2" (Average Quantization; only if its bias stays in the gradient
            of one weight). None takes all of 0.25, 0.5, 1, "2avg2", 2, 3, 4, 5, 6, 8 and "exact" that
            the quantizer can have.
        sensitivity: "empirical" (one or two backward passes for each tensor that reaches further than
            its own weight), "closed_form" (one backward pass in all), "gradient_norms", or a
            :class:`~brevitas_bp.allocate.sensitivity.Sensitivity`.
        method: "optimal" (integer programming; needs SciPy) or "greedy".
        act_quant: the quantizer. The candidates are variants of it, with its rounding, scale rule,
            bucket size and metadata.
        seed: of the roundings.
        progress: True shows a bar on stderr (with rich, if installed). A function is called with a text:
            first with the expected cost, then with the progress.
        **wrapper_options: further arguments of :class:`QuantBackwardWrapper`, for a network that is not
            wrapped: ``policy``, ``overrides``, ``bucket_size``, ...

    Raises:
        InfeasibleBudgetError: the smallest widths take more than the budget; the message says how much.
        ValueError: an argument is out of range, the loss is no scalar, or the quantizer cannot have a
            candidate, such as one bit of signed codes.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        >>> plan = plan_bit_widths(
        ...     net, torch.randn(64, 64), lambda model, x: model(x).square().mean(), average_bits=3)
        >>> plan.average_bits <= 3
        True
        >>> model = QuantBackwardWrapper(net, plan=plan)
    """
    check_budget(budget, average_bits)
    check_method(method)
    chosen = _check_candidates(CANDIDATES if candidates is None else candidates)
    estimate = estimator(sensitivity)
    wrapped = _wrapped(model, act_quant, wrapper_options)
    start = time.perf_counter()
    profile = Profile(wrapped, batch, loss_fn, seed)
    chosen = _available(profile, chosen, given=candidates is not None)
    passes, before = estimate.passes(profile, chosen), time.perf_counter()
    profile.exact  # noqa: B018  (timed, to predict the cost)
    cost = (
        f"{len(profile.groups)} tensors, {passes} backward passes of about "
        f"{time.perf_counter() - before:.2g} s")
    with _progress(progress, cost, passes) as tick:
        errors = estimate.errors(profile, chosen, tick)
    plan = BitPlan(
        tuple(_planned(profile, i, chosen, row) for i, row in enumerate(errors)),
        profile.fixed_bytes, profile.exact_bytes, profile.energy, estimate.name, method, passes,
        time.perf_counter() - start)
    return plan.within(budget=budget, average_bits=average_bits, method=method)


def _wrapped(model: nn.Module, act_quant: ActQuant, options: dict[str, Any]) -> QuantBackwardWrapper:
    if not isinstance(model, QuantBackwardWrapper):
        if any(True for _ in wrappers_in(model)):
            raise TypeError(
                f"{_WHERE}: {type(model).__name__} contains wrappers, which round by themselves; "
                "plan for each of them, or wrap the whole once")
        return QuantBackwardWrapper(model, act_quant, **options)
    if options or act_quant is not RotatedNormal2DynamicActPerBucketFloat:
        raise TypeError(
            f"{_WHERE}: the model is wrapped already, so the settings "
            f"{sorted(options) or ['act_quant']} would do nothing; change those of the "
            "wrapper, or pass wrapper.module")
    return model


def _check_candidates(given: Sequence[Candidate | float | str]) -> list[Candidate]:
    found = list(dict.fromkeys(Candidate.parse(c) for c in given))
    if len(found) < 2:
        raise ValueError(f"{_WHERE}: candidates must hold two or more widths, got {list(given)}")
    return found


def _available(profile: Profile, candidates: list[Candidate], given: bool) -> list[Candidate]:
    """Refuses a candidate that a quantizer cannot have, before anything is measured.

    If the user has ``given`` no candidates, those are left out: signed codes have no width of 1 bit.
    """
    found = []
    for candidate in candidates:
        try:
            for configured in {id(t.configured): t.configured for t in profile.tensors}.values():
                candidate.codec(configured)
        except ValueError:
            if given:
                raise
        else:
            found.append(candidate)
    return found


def _planned(
        profile: Profile, index: int, candidates: list[Candidate],
        errors: Sequence[float]) -> PlannedTensor:
    """Returns a group with all candidates that it may have; for now it chooses the smallest."""
    group = profile.groups[index]
    if not any(errors):
        # No gradient reaches this group yet (a last layer that starts at zero): it gets spare bytes.
        errors = [
            _UNSEEN * profile.energy * sum(profile.distance(t, c) for t in group.tensors)
            for c in candidates]
    # The bias of averages must reach no gradient but that of the tensor's own weight.
    options = {
        str(c): (float(profile.stored_bytes(group, c)), error) for c, error in zip(candidates, errors)
        if c.average_size == 1 or group.parameters is not None}
    given, growth = _growth(profile, group, candidates, [Candidate.parse(name) for name in options])
    return PlannedTensor(
        tuple(group.sites), group.numel, group.exact_bytes, group.reach, options,
        min(options, key=lambda name: options[name]), given, growth)


def _growth(
        profile: Profile, group: Group, candidates: list[Candidate],
        options: list[Candidate]) -> tuple[str | None, dict[str, dict[str, float]]]:
    """Returns the derivative that a group is stored given, and how its candidates change errors.

    See NOTE [ Errors that depend on two widths ].
    """
    owners = {
        profile.group_of(t.difference.derivative) for t in group.tensors if t.difference is not None}
    owner = owners.pop() if len(owners) == 1 else None
    if owner is None:
        return None, {}

    def distance(own: Candidate, derivative: Candidate | None) -> float:
        return sum(profile.distance_given(t, own, derivative) for t in group.tensors)

    growth: dict[str, dict[str, float]] = {}
    for name, own in (("", _REFERENCE), *((str(o), o) for o in options if o.average_size > 1)):
        usual = distance(own, None)
        growth[name] = {
            str(c): distance(own, c) / usual for c in candidates if c.average_size == 1
        } if usual > 0 else {}
    return owner.sites[0], growth


@contextmanager
def _progress(
        shown: bool | Callable[[str], None], cost: str, passes: int) -> Iterator[Callable[[], None]]:
    """Yields a function to call after each backward pass."""
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
