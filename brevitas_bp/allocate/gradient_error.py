"""Bias and noise of the compressed gradient against the exact gradient, measured over many draws."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from brevitas_bp.allocate.error_rows import GradientError, GradientErrorRow
from brevitas_bp.allocate.loss import checked_loss
from brevitas_bp.allocate.moments import Cosines, Facts, Moments, real
from brevitas_bp.allocate.sources import Place, Roundings
from brevitas_bp.allocate.unchanged import apart, unchanged
from brevitas_bp.backward.seam import wrappers_in
from brevitas_bp.backward.wrapper import QuantBackwardWrapper

_WHERE = "brevitas_bp.allocate.measure_gradient_error"

#: A gradient below this share of the largest is zero up to float32 rounding (a bias before a norm).
NEGLIGIBLE = 1e-6


@overload
def measure_gradient_error(
        model: nn.Module, run: Callable[[Any], Tensor], *, draws: int = 32, seed: int = 0,
        batches: None = None, by_source: bool = False, progress: bool = False) -> GradientError: ...


@overload
def measure_gradient_error(
        model: nn.Module, run: Callable[[Any, Any], Tensor], *, draws: int = 32, seed: int = 0,
        batches: Iterable[Any], by_source: bool = False, progress: bool = False) -> GradientError: ...


def measure_gradient_error(
        model: nn.Module,
        run: Callable[..., Tensor],
        *,
        draws: int = 32,
        seed: int = 0,
        batches: Iterable[Any] | None = None,
        by_source: bool = False,
        progress: bool = False) -> GradientError:
    """Compares compressed gradients with the exact one, for each parameter, each module and the network.

    Every gradient is taken at the same point. torch's random state, buffers and training mode are those
    at the call, so dropout masks agree. Afterwards they are restored, also after an exception. So are
    ``.grad``, the wrappers' noise and their quantizers.

    With ``batches`` this is the procedure of Chen et al., "ActNN", 2021. The bias is that of the
    gradient averaged over the batches, and the variance is that of one batch. The variance of the exact
    gradient from batch to batch is reported too.

    The bias is ``|m - g|``, for the mean m of the draws, after subtracting the part that is there by
    chance. A bias far below ``noise / sqrt(draws)`` cannot be seen.

    Cost: ``draws + 1`` forward and backward passes for each batch, ``3 draws + 1`` with ``by_source``.
    Codes are made in the forward pass, so each draw needs its own. Memory: two float64 copies of the
    gradients, four with ``batches``; twice more with ``by_source``.

    Args:
        model: a ``QuantBackwardWrapper``, a ``QuantGradientWrapper``, or a module with wrappers inside.
            The exact gradient is the gradient with nothing rounded in backward.
        run: ``run(model)``, or with ``batches`` ``run(model, batch)``. It runs the module and returns
            the loss, without backward. The loss must be the same at every call. Random augmentation
            with other generators than torch's belongs outside of ``run``.
        draws: compressed gradients for each batch, at least 2.
        seed: of the roundings; the wrappers' own seeds are not used.
        batches: second arguments of ``run``, at least 2 of them.
        by_source: also measure the saved activations alone, and the gradients alone, see
            :attr:`GradientError.sources`.
        progress: show a progress bar (needs ``rich``).

    Raises:
        TypeError: ``model`` has no wrapper, or ``DistributedDataParallel`` is around it. Gradients
            come from ``torch.autograd.grad``, so neither ``.grad`` nor a hook on it sees them.
        ValueError: too few draws or batches; a loss that is no scalar, has no gradient, changes from
            call to call or has parts checkpointed with ``use_reentrant=True``; an exact gradient that
            is not finite.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> x = torch.randn(256, 64)
        >>> error = measure_gradient_error(
        ...     QuantBackwardWrapper(net), lambda module: module(x).logsumexp(1).mean(), draws=4)
        >>> [row.name for row in error.modules], error.parameters[1].noise  # biases are exact
        (['0', '2'], 0.0)
    """
    roundings = Roundings(model)
    refuse_parallel(_WHERE, model)
    if not roundings.gradients:
        wrappers_of(_WHERE, model)
    if draws < 2:
        raise ValueError(
            f"{_WHERE}: draws must be at least 2, or there is no variance to subtract, got {draws}")
    named = named_parameters(_WHERE, model)

    def checked(model: nn.Module, *arguments: Any) -> Tensor:
        return checked_loss(f"{_WHERE}: run", run(model, *arguments))

    sources: dict[str, Any] = {"all": nullcontext}
    if by_source:
        sources |= {kind: partial(roundings.only, Place(kind)) for kind in roundings.kinds()}
    moments = {source: [Moments() for _ in named] for source in sources}
    cosines = {source: Cosines() for source in sources}
    with unchanged(model, roundings.saved, seed, rounded_gradients=True) as restore, torch.enable_grad():
        points = [()] if batches is None else ((batch,) for batch in apart(batches))
        for number, arguments in enumerate(points, start=1):
            restore()
            with roundings.only(None):
                exact, loss = gradients_of(checked, model, named, arguments)
            _check_finite(exact, named)
            for source, rounding in sources.items():
                for of_one, gradient in zip(moments[source], exact):
                    of_one.start(gradient)
                for _ in _bar(range(draws), progress, f"batch {number}, {source}"):
                    restore()
                    with rounding():
                        gradients, again = gradients_of(checked, model, named, arguments)
                    _check_same_loss(loss, again)
                    cosines[source].add([
                        of_one.add(g) for of_one, g in zip(moments[source], gradients)])
                for of_one in moments[source]:
                    of_one.finish()
    count = moments["all"][0].exact.count
    if batches is not None and count < 2:
        raise ValueError(
            f"{_WHERE}: batches must yield at least 2, or there is no sampling variance, got "
            f"{count}; leave batches out for one")
    errors = {
        source: _summarize(list(named), [m.facts() for m in of_source], cosines[source], draws)
        for source, of_source in moments.items()}
    return replace(errors.pop("all"), sources=errors)


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
        # The squared distance of a mean is too large by the variance of that mean: this part is chance.
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


def wrappers_of(where: str, model: nn.Module) -> list[QuantBackwardWrapper]:
    """Returns the wrappers in a model whose gradients are to be compared.

    Raises:
        TypeError: the model has no wrapper, or contains ``DistributedDataParallel``.
    """
    wrappers = [wrapper for _, wrapper in wrappers_in(model)]
    if not wrappers:
        raise TypeError(
            f"{where}: model must be a QuantBackwardWrapper or contain one, got "
            f"{type(model).__name__}; without a wrapper every gradient is exact")
    refuse_parallel(where, model)
    return wrappers


def refuse_parallel(where: str, model: nn.Module) -> None:
    """Refuses a model that contains ``DistributedDataParallel``.

    Raises:
        TypeError: it does.
    """
    if any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        raise TypeError(
            f"{where}: model must not be inside of DistributedDataParallel, which averages .grad, but "
            "this function leaves nothing in .grad; pass the module that it wraps")


def named_parameters(where: str, model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns trainable parameters by name.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(f"{where}: no parameter of {type(model).__name__} requires a gradient")
    return named


def gradients_of(
        run: Callable[..., Tensor], model: nn.Module, named: dict[str, nn.Parameter],
        arguments: tuple[Any, ...] = ()) -> tuple[Sequence[Tensor], Tensor]:
    """Returns the parameters' gradients and the loss; zeros for parameters without a gradient."""
    loss = run(model, *arguments)
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
    # The forward pass is bit-identical, but a GPU may sum in another order.
    tolerance = 64 * torch.finfo(expected.dtype).eps
    if not math.isclose(expected, got, rel_tol=tolerance):
        raise ValueError(
            f"{_WHERE}: run must compute the same loss at every call, got {float(expected):.9g} and "
            f"then {float(got):.9g}; draw the batch, and its augmentation, outside of run")


def _bar(draws: Iterable[int], progress: bool, description: str) -> Iterable[int]:
    if not progress:
        return draws
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return draws
    return track(draws, description, console=Console(stderr=True))
