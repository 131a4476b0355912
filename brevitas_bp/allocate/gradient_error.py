"""Bias and noise of the compressed gradient against the exact one: measured over many draws."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from brevitas_bp.allocate.moments import Cosines, Facts, Moments, real
from brevitas_bp.allocate.unchanged import apart, exact_policy, unchanged
from brevitas_bp.backward.explain import table
from brevitas_bp.backward.wrapper import QuantBackwardWrapper

_WHERE = "brevitas_bp.allocate.measure_gradient_error"

#: Share of the largest gradient below which one is zero but for float32 rounding (a bias before a norm).
NEGLIGIBLE = 1e-6

Quantity = Literal["bias", "noise", "signal", "cosine", "sampling_noise"]
_QUANTITIES: tuple[Quantity, ...] = ("signal", "bias", "noise", "cosine", "sampling_noise")


@dataclass(frozen=True)
class GradientErrorRow:
    """Error of one parameter's gradient, or of several taken as one vector.

    With g the exact gradient, g~ a compressed one and m the mean of those over the draws.

    Attributes:
        name: of the parameter or module; "total" for the network.
        elements: how many numbers.
        size: ``|g|``.
        variance: total variance ``E |g~ - E g~|^2`` over the roundings of one batch.
        offset: estimate of ``|E g~ - g|^2``: what the finite number of draws leaves by chance of
            ``|m - g|^2`` is taken off, so it is below 0 about as often as above where there is no bias.
        along: ``<m - g, g>``.
        cosine: mean of the cosine between one g~ and g; NaN where ``negligible``.
        sampling_variance: total variance of the exact gradient from batch to batch; None for one batch.
        negligible: the exact gradient is zero but for rounding, so nothing is divided by its size.
    """

    name: str
    elements: int
    size: float
    variance: float
    offset: float
    along: float
    cosine: float
    sampling_variance: float | None
    negligible: bool

    @property
    def bias(self) -> float:
        """``|E g~ - g| / |g|``; 0 where chance explains all of it."""
        return self._relative(max(self.offset, 0.0) ** 0.5)

    @property
    def noise(self) -> float:
        """``sqrt(variance) / |g|``."""
        return self._relative(self.variance**0.5)

    @property
    def signal(self) -> float:
        """``<m, g> / |g|^2``: how much of the gradient is left; 1 where rounding is unbiased."""
        return 1 + self._relative(self._relative(self.along))

    @property
    def sampling_noise(self) -> float:
        """Deviation from batch to batch over ``|g|``; NaN for one batch."""
        variance = math.nan if self.sampling_variance is None else self.sampling_variance
        return self._relative(variance**0.5)

    def to_dict(self) -> dict[str, Any]:
        """Attributes and relative quantities for JSON; what is undefined is None."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {quantity: getattr(self, quantity) for quantity in _QUANTITIES}
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()}

    def _relative(self, x: float) -> float:
        return math.nan if self.negligible else x / self.size


@dataclass(frozen=True)
class GradientError:
    """What :func:`measure_gradient_error` found; ``print`` it for a table over the modules.

    Attributes:
        draws: compressed gradients for each batch.
        batches: number of batches.
        parameters: one row for each parameter that has a gradient, in the order of the model.
        modules: one row for each module that holds such parameters itself, as one vector.
        total: all parameters as one vector.
    """

    draws: int
    batches: int
    parameters: list[GradientErrorRow]
    modules: list[GradientErrorRow]
    total: GradientErrorRow

    def median(self, quantity: Quantity) -> float:
        """Median over the parameters that are not negligible."""
        return median([getattr(row, quantity) for row in self._compared()] or [math.nan])

    def largest(self, quantity: Quantity) -> float:
        """Largest over the parameters that are not negligible."""
        return max((getattr(row, quantity) for row in self._compared()), default=math.nan)

    def table(self, by: Literal["module", "parameter"] = "module") -> str:
        """Text with one line for each module or parameter; ``-`` where the gradient is negligible."""
        shown: list[Quantity] = list(_QUANTITIES if self.batches > 1 else _QUANTITIES[:-1])
        lines = [(by, "elements", "size", *(q.replace("_", " ") for q in shown))]
        for row in [*(self.modules if by == "module" else self.parameters), self.total]:
            numbers = (f"{getattr(row, q):.4f}".replace("nan", "-") for q in shown)
            lines.append((row.name or "(root)", str(row.elements), f"{row.size:.3g}", *numbers))
        return "\n".join([table(lines, left=1, total=True), self._summary()])

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "draws": self.draws, "batches": self.batches,
            "parameters": [row.to_dict() for row in self.parameters],
            "modules": [row.to_dict() for row in self.modules], "total": self.total.to_dict()}

    def _compared(self) -> list[GradientErrorRow]:
        return [row for row in self.parameters if not row.negligible]

    def _summary(self) -> str:
        compared = self._compared()
        text = (
            f"{self.draws} draws x {self.batches} batches, {len(compared)} parameters; "
            f"{len(self.parameters) - len(compared)} more have a gradient of zero")
        for quantity in ("bias", "noise") if compared else ():
            worst = max(compared, key=lambda row: getattr(row, quantity))
            text += (
                f"\n{quantity}: median {self.median(quantity):.4f}, largest "
                f"{self.largest(quantity):.4f} ({worst.name})")
        return text


def measure_gradient_error(
        model: nn.Module,
        run: Callable[..., Tensor],
        *,
        draws: int = 32,
        seed: int = 0,
        batches: Iterable[Any] | None = None,
        progress: bool = False) -> GradientError:
    """Compares compressed gradients with the exact one, for each parameter, module and the network.

    Every gradient is taken at the same point: torch's random state, buffers and training mode are
    those at the call, so dropout masks agree. Afterwards they are as they were (also after an
    exception), as are ``.grad``, the noise of the wrappers and their quantizers.

    With ``batches`` this is the procedure of Chen et al., "ActNN", 2021: the bias is that of the
    gradient averaged over the batches, the variance that of one batch, and the variance of the exact
    gradient from batch to batch stands beside it.

    Cost: ``draws + 1`` forward and backward passes for each batch (codes are made in forward, so that no
    forward serves two draws), and memory for two float64 copies of the gradients, four with ``batches``.

    Args:
        model: a wrapper, or a module with wrappers inside. The exact gradient is that with every
            wrapper's policy set to "exact".
        run: ``run(model)``, with ``batches`` ``run(model, batch)``: runs the module and returns the
            loss, without backward. The loss must be the same at every call; random augmentation of other
            generators than torch's belongs outside.
        draws: compressed gradients for each batch, at least 2.
        seed: of the roundings; the wrappers' own seeds are not used.
        batches: what ``run`` gets as second argument, at least 2 of them.
        progress: show a bar (needs ``rich``).

    Raises:
        TypeError: no wrapper in ``model``.
        ValueError: too few draws or batches; a loss that is no scalar, has no gradient or changes from
            call to call; an exact gradient that is not finite.
        RuntimeError: raised by torch for parts that are checkpointed with ``use_reentrant=True``:
            gradients are asked for by ``torch.autograd.grad``, so that no ``.grad`` is touched.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> x = torch.randn(256, 64)
        >>> error = measure_gradient_error(
        ...     QuantBackwardWrapper(net), lambda module: module(x).logsumexp(1).mean(), draws=4)
        >>> [row.name for row in error.modules], error.parameters[1].noise  # biases are exact
        (['0', '2'], 0.0)
    """
    wrappers = [m for m in model.modules() if isinstance(m, QuantBackwardWrapper)]
    if not wrappers:
        raise TypeError(
            f"{_WHERE}: model must be a QuantBackwardWrapper or contain one, got "
            f"{type(model).__name__}; without a wrapper every gradient is exact")
    if draws < 2:
        raise ValueError(
            f"{_WHERE}: draws must be at least 2, or there is no variance to take off, got {draws}")
    named = _named_parameters(model)
    moments = [Moments() for _ in named]
    cosines = Cosines()
    with unchanged(model, wrappers, seed) as restore, torch.enable_grad():
        points = [()] if batches is None else ((batch,) for batch in apart(batches))
        for number, arguments in enumerate(points, start=1):
            restore()
            with exact_policy(wrappers):
                exact, loss = _gradients(run, model, named, arguments)
            _check_finite(exact, named)
            for of_one, gradient in zip(moments, exact):
                of_one.start(gradient)
            for _ in _bar(range(draws), progress, f"batch {number}"):
                restore()
                gradients, again = _gradients(run, model, named, arguments)
                _check_same_loss(loss, again)
                cosines.add([of_one.add(g) for of_one, g in zip(moments, gradients)])
            for of_one in moments:
                of_one.finish()
    if batches is not None and moments[0].exact.count < 2:
        raise ValueError(
            f"{_WHERE}: batches must yield at least 2, or there is no variance of sampling, got "
            f"{moments[0].exact.count}; leave batches out for one")
    return _summarize(list(named), [m.facts(draws) for m in moments], cosines, draws)


def _summarize(
        names: list[str], facts: list[Facts], cosines: Cosines, draws: int) -> GradientError:
    threshold = NEGLIGIBLE * max(f.size for f in facts) ** 0.5
    modules: defaultdict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        modules[name.rpartition(".")[0]].append(i)

    def row(name: str, parameters: list[int]) -> GradientErrorRow:
        chosen = [facts[i] for i in parameters]
        size, variance = sum(f.size for f in chosen) ** 0.5, sum(f.variance for f in chosen)
        negligible = size <= threshold
        # Of the squared distance of the mean, the variance of a mean of all draws is chance.
        chance = variance / (draws * batches)
        return GradientErrorRow(
            name, sum(f.elements for f in chosen), size, variance,
            sum(f.drift for f in chosen) - chance, sum(f.along for f in chosen),
            math.nan if negligible else cosines.mean(parameters),
            sum(f.sampling for f in chosen) if batches > 1 else None, negligible)

    batches = facts[0].batches
    return GradientError(
        draws, batches, [row(name, [i]) for i, name in enumerate(names)],
        [row(name, parameters) for name, parameters in modules.items()],
        row("total", list(range(len(names)))))


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by their names in the ``state_dict``, where wrappers have no name."""
    inside = [
        f"{name}." if name else "" for name, module in model.named_modules()
        if isinstance(module, QuantBackwardWrapper)]
    named = {}
    for name, parameter in model.named_parameters():
        for prefix in reversed(inside):
            if name.startswith(f"{prefix}module."):
                name = prefix + name.removeprefix(f"{prefix}module.")
        if parameter.requires_grad:
            named[name] = parameter
    if not named:
        raise ValueError(f"{_WHERE}: no parameter of {type(model).__name__} requires a gradient")
    return named


def _gradients(
        run: Callable[..., Tensor], model: nn.Module, named: dict[str, nn.Parameter],
        arguments: tuple[Any, ...]) -> tuple[Sequence[Tensor], Tensor]:
    loss = run(model, *arguments)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"{_WHERE}: run must return the loss, a tensor of one element that depends on the "
            f"parameters, got {got}; leave backward to this function")
    gradients = torch.autograd.grad(
        loss, list(named.values()), torch.ones_like(loss), allow_unused=True, materialize_grads=True)
    return gradients, loss.detach()


def _check_finite(gradients: Sequence[Tensor], named: dict[str, nn.Parameter]) -> None:
    for name, gradient in zip(named, gradients):
        if not real(gradient).isfinite().all():
            raise ValueError(
                f"{_WHERE}: the exact gradient of {name} must be finite to compare with, got NaN or "
                "Inf; scale the loss, or look for where they come from")


def _check_same_loss(expected: Tensor, got: Tensor) -> None:
    # The forward pass is bit-identical, but on a GPU its sums may be taken in another order.
    tolerance = 64 * torch.finfo(expected.dtype).eps
    if not math.isclose(expected, got, rel_tol=tolerance):
        raise ValueError(
            f"{_WHERE}: run must compute the same loss at every call, got {float(expected):.9g} and "
            f"then {float(got):.9g}; draw the batch, and its augmentation, outside of run")


def _bar(draws: Iterable[int], progress: bool, description: str) -> Iterable[int]:
    if not progress:
        return draws
    from rich.console import Console
    from rich.progress import track

    return track(draws, description, console=Console(stderr=True))
