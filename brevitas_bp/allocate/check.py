"""Checks how rounding changes a network's gradients: a quick check, and a monitor for training."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from brevitas_bp.allocate.gradient_error import gradients_of, named_parameters, wrappers_of
from brevitas_bp.allocate.loss import checked_loss
from brevitas_bp.allocate.moments import real
from brevitas_bp.allocate.sources import RoundsOnly
from brevitas_bp.allocate.unchanged import exact_policy, unchanged
from brevitas_bp.backward.planned import site_of
from brevitas_bp.backward.saved import Decision, SavedTensor
from brevitas_bp.backward.seam import policy_of, using_policy
from brevitas_bp.backward.wrapper import QuantBackwardWrapper
from brevitas_bp.codec import Codec
from brevitas_bp.text import table

_WHERE = "brevitas_bp.check_gradients"
_LOG = logging.getLogger("brevitas_bp")

#: Errors of one gradient, |g~ - g| / |g|, up to which the verdict is "close" and "noisy".
CLOSE, NOISY = 0.5, 2.0
#: Share of the exact gradient that must remain on average.
_ENOUGH_SIGNAL = 0.9
# The rounded tensors are split into this many parts, to find the tensors with most of the error.
_PARTS = 4

#: Reach of a rounding -> description of such tensors, and the setting that gives them more bits.
_KINDS = {
    "weight": ("inputs of layers", "bit_width={bits}"),
    "sum": ("values of attention, factors of sums", "bit_width={bits}"),
    "norm": ("inputs of norms", "policy=OpAware(norm_bits={bits})"),
    "all": ("derivatives and factors", "policy=OpAware(multiplier_bits={bits})"),
}


@dataclass(frozen=True)
class RoundedKind:
    """Tensors whose rounding errors reach the gradient in the same way.

    Attributes:
        name: description of these tensors.
        tensors: number of saved tensors, by name.
        bits: the most bits of any of them; None: the quantizer has no width to choose.
        error: ``|g~ - g| / |g|`` with these tensors rounded and all others exact.
        remedy: the setting that gives them more bits; empty if the error is small.
    """

    name: str
    tensors: int
    bits: int | None
    error: float
    remedy: str


@dataclass(frozen=True)
class RoundedSite:
    """A saved tensor with much of the error.

    Attributes:
        name: module, operation, and role of the tensor in it.
        error: ``|g~ - g| / |g|`` with this tensor rounded and all others exact.
    """

    name: str
    error: float


@dataclass(frozen=True)
class GradientCheck:
    """The result of :func:`check_gradients`. ``print`` it.

    Attributes:
        error: ``|g~ - g| / |g|`` of one gradient of all parameters, root mean square over the draws.
        signal: ``<mean g~, g> / |g|^2``: the share of the exact gradient that remains on average.
        draws: number of roundings drawn.
        kinds: the kinds of rounded tensors, the largest error first.
        sites: the tensors with most of the error, the largest error first.
    """

    error: float
    signal: float
    draws: int
    kinds: list[RoundedKind] = field(default_factory=list)
    sites: list[RoundedSite] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the gradient is usable: its error is at most 2, and its mean is not shrunk."""
        # With few draws the signal itself is noisy: its noise is the error over the root of the draws.
        chance = 2 * self.error / math.sqrt(self.draws)
        return self.error <= NOISY and self.signal >= _ENOUGH_SIGNAL - chance

    @property
    def verdict(self) -> str:
        """The verdict in one sentence."""
        if not math.isfinite(self.error):
            return "wrong: the rounded gradient is not finite"
        if not self.ok:
            return "wrong: rounding drowns the gradient; take the remedies below"
        if self.error > CLOSE:
            return "noisy: usable where noise averages out over steps, as with small batches"
        return "close to the exact one"

    def __str__(self) -> str:
        lines = [
            f"gradient: {self.verdict}",
            f"  error |g~ - g| / |g| of one step: {self.error:.3g}   signal left: {self.signal:.3f}   "
            f"({self.draws} draws)"]
        if self.kinds:
            rows = [("rounded alone", "tensors", "bits", "error", "remedy")]
            rows += [(k.name, str(k.tensors), "-" if k.bits is None else str(k.bits),
                      f"{k.error:.3g}", k.remedy) for k in self.kinds]
            lines += ["", _left_last(rows)]
        if self.sites:
            rows = [("tensor rounded alone", "error")]
            rows += [(s.name, f"{s.error:.3g}") for s in self.sites]
            lines += ["", table(rows, left=1)]
            module = self.sites[0].name.partition(":")[0]
            if module and not self.ok:
                lines.append(f"to keep the first exact: overrides={{{module!r}: None}}")
        return "\n".join(lines)


def check_gradients(
        model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor], *, draws: int = 2,
        top: int = 3, seed: int = 0) -> GradientCheck:
    """Compares the rounded gradient of one batch with the exact gradient, and suggests remedies.

    The check takes these steps:

    * one exact step;
    * ``draws`` rounded steps;
    * one step for each kind of tensor (inputs of layers, inputs of norms, derivatives and factors, ...),
      with that kind rounded alone;
    * about ``4 log4(tensors)`` more steps, to find the tensors with most of the error.

    Afterwards model, random state, ``.grad`` and the wrappers' noise are as before. For bias and noise
    of each parameter see :func:`~brevitas_bp.allocate.measure_gradient_error`.

    Args:
        model: a wrapper, or a module with wrappers inside.
        batch: passed to ``loss``.
        loss: ``(model, batch) -> scalar loss``, without backward.
        draws: number of steps with all tensors rounded.
        top: number of tensors with most of the error to look for; 0: none.
        seed: of the roundings.

    Returns:
        The check. Its text has verdict, error, kinds and tensors with their remedies.

    Raises:
        TypeError: ``model`` has no wrapper.
        ValueError: an argument is out of range, the loss is no scalar, or the exact gradient is zero or
            not finite.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> x = torch.randn(256, 64)
        >>> check = check_gradients(
        ...     QuantBackwardWrapper(net), x, lambda model, x: model(x).logsumexp(1).mean())
        >>> check.verdict, [kind.name for kind in check.kinds]
        ('close to the exact one', ['inputs of layers'])
    """
    for name, number, least in (("draws", draws, 1), ("top", top, 0)):
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ValueError(
                f"{_WHERE}: {name} must be an integer of {least} or more, got {number!r}")
    wrappers = wrappers_of(_WHERE, model)
    named = named_parameters(_WHERE, model)

    def run(model: nn.Module) -> Tensor:
        return checked_loss(f"{_WHERE}: loss", loss(model, batch))

    with unchanged(model, wrappers, seed) as restore, torch.enable_grad():
        probe = _Probe(wrappers, lambda: gradients_of(run, model, named)[0], restore)
        error, signal = probe.draw(draws)
        if not math.isfinite(error):
            return GradientCheck(error, signal, draws)
        kinds = probe.kinds()
        sites = probe.worst(top) if top else []
    return GradientCheck(error, signal, draws, kinds, sites)


class GradientMonitor:
    """Estimates the gradient's error while a model trains, from one draw every few steps.

    Each estimate costs two more forward and backward passes and the memory of an exact step. The
    logger "brevitas_bp" logs it at level INFO, or at WARNING if the error is above 2.

    Args:
        model: a wrapper, or a module with wrappers inside.
        loss: ``(model, batch) -> scalar loss``, without backward.
        every: steps from one estimate to the next.

    Example:
        >>> net = QuantBackwardWrapper(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)))
        >>> monitor = GradientMonitor(net, lambda model, x: model(x).logsumexp(1).mean(), every=2)
        >>> [monitor.step(torch.randn(256, 64)) is None for _ in range(4)]
        [False, True, False, True]
    """

    def __init__(
            self, model: nn.Module, loss: Callable[[Any, Any], Tensor], every: int = 200) -> None:
        where = "brevitas_bp.allocate.GradientMonitor"
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"{where}: every must be a positive number of steps, got {every!r}")
        wrappers_of(where, model)
        self.model, self.loss, self.every = model, loss, every
        self.steps = 0
        #: (step, error) of all estimates.
        self.history: list[tuple[int, float]] = []

    def step(self, batch: Any) -> float | None:
        """Counts a step. Returns the error if this step is measured, else None."""
        self.steps += 1
        if (self.steps - 1) % self.every:
            return None
        wrappers = wrappers_of(_WHERE, self.model)
        named = named_parameters(_WHERE, self.model)

        def run(model: nn.Module) -> Tensor:
            return checked_loss(f"{_WHERE}: loss", self.loss(model, batch))

        with unchanged(self.model, wrappers, self.steps) as restore, torch.enable_grad():
            error, signal = _Probe(
                wrappers, lambda: gradients_of(run, self.model, named)[0], restore).draw(1)
        self.history.append((self.steps - 1, error))
        _LOG.log(
            logging.WARNING if not error <= NOISY else logging.INFO,
            "step %d: error of the rounded gradient %.3g, signal left %.3f", self.steps - 1, error,
            signal)
        return error


class _Probe:
    """Takes gradients with some tensors rounded and all others exact, and compares them."""

    def __init__(
            self, wrappers: list[QuantBackwardWrapper], gradients: Callable[[], Sequence[Tensor]],
            restore: Callable[[], None]) -> None:
        self.wrappers, self.gradients, self.restore = wrappers, gradients, restore
        self.found: dict[str, tuple[SavedTensor, Decision]] = {}
        restore()
        with exact_policy(wrappers):
            self.exact = [real(g) for g in gradients()]
        self.energy = sum(float(g.square().sum()) for g in self.exact)
        if not math.isfinite(self.energy) or self.energy == 0:
            raise ValueError(
                f"{_WHERE}: the exact gradient must be finite and not zero to compare with, got "
                f"|g|^2 = {self.energy}; scale the loss, or check with another batch")

    def draw(self, draws: int) -> tuple[float, float]:
        """Returns the error of one gradient, and the share of the exact one that remains on average."""
        distances, along = 0.0, 0.0
        for _ in range(draws):
            distance, dot = self._compare(None)
            distances += distance / draws
            along += dot / draws
        return math.sqrt(distances / self.energy), 1 + along / self.energy

    def kinds(self) -> list[RoundedKind]:
        """Measures each kind of tensor alone."""
        by_reach: dict[str, list[str]] = {}
        for name, (_, decision) in self.found.items():
            by_reach.setdefault(decision.reach, []).append(name)
        found = []
        for reach, names in by_reach.items():
            error = self.error_of(set(names))
            bits = [_bits_of(self.found[n][1].codec) for n in names]
            most = None if None in bits else max(cast("list[int]", bits))
            name, setting = _KINDS[reach]
            remedy = "" if error <= CLOSE or most is None else setting.format(
                bits=min(8, most + math.ceil(math.log2(error / CLOSE))))
            found.append(RoundedKind(name, len(names), most, error, remedy))
        return sorted(found, key=lambda kind: -kind.error)

    def worst(self, count: int) -> list[RoundedSite]:
        """Finds the tensors with most of the error by splitting the worst part repeatedly."""
        done: list[RoundedSite] = []
        parts = [(self.error_of(set(p)), p) for p in _split(list(self.found))]
        while parts and len(done) < count:
            error, names = parts.pop(max(range(len(parts)), key=lambda i: parts[i][0]))
            if len(names) == 1:
                done.append(RoundedSite(names[0], error))
            else:
                parts += [(self.error_of(set(p)), p) for p in _split(names)]
        return done

    def error_of(self, names: set[str]) -> float:
        """Returns ``|g~ - g| / |g|`` with the tensors of these names rounded."""
        return math.sqrt(self._compare(names)[0] / self.energy)

    def _compare(self, names: set[str] | None) -> tuple[float, float]:
        """Returns ``|g~ - g|^2`` and ``<g~ - g, g>``, with these tensors rounded; None: all."""

        def selected(saved: SavedTensor, decision: Decision) -> bool:
            name = site_of(saved)
            self.found.setdefault(name, (saved, decision))
            return names is None or name in names

        self.restore()
        with ExitStack() as stack:
            for wrapper in self.wrappers:
                only = RoundsOnly(policy_of(wrapper), selected)
                stack.enter_context(using_policy(wrapper, only))
            rounded = self.gradients()
        differences = [real(r) - e for r, e in zip(rounded, self.exact)]
        return (
            sum(float(d.square().sum()) for d in differences),
            sum(float((d * e).sum()) for d, e in zip(differences, self.exact)))


def _bits_of(codec: Codec | None) -> int | None:
    """Returns the smallest width of a bucket quantizer; None for other codecs."""
    return None if codec is None else min(codec.bit_widths, default=None)


def _split(names: list[str]) -> Iterable[list[str]]:
    size = -(-len(names) // _PARTS)
    return [names[i:i + size] for i in range(0, len(names), max(size, 1))]


def _left_last(rows: list[tuple[str, ...]]) -> str:
    """Formats a table whose first and last columns are flush left."""
    width = max(len(row[-1]) for row in rows)
    return table([(*row[:-1], row[-1].ljust(width)) for row in rows], left=1)
