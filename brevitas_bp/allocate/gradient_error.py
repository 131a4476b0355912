"""Bias and noise of the compressed gradient against the exact one: measured over many draws."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from brevitas_bp.allocate.error_rows import GradientError, GradientErrorRow
from brevitas_bp.allocate.loss import checked_loss
from brevitas_bp.allocate.moments import Cosines, Facts, Moments, real
from brevitas_bp.allocate.unchanged import apart, exact_policy, unchanged
from brevitas_bp.backward.seam import wrappers_in
from brevitas_bp.backward.wrapper import QuantBackwardWrapper

_WHERE = "brevitas_bp.allocate.measure_gradient_error"

#: Share of the largest gradient below which one is zero but for float32 rounding (a bias before a norm).
NEGLIGIBLE = 1e-6


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

    The bias is what is left of ``|m - g|`` for the mean m of the draws when the part is taken off that
    is there by chance. Far below ``noise / sqrt(draws)`` nothing is left to be seen of it.

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
        TypeError: no wrapper in ``model``, or ``DistributedDataParallel`` around it: gradients come from
            ``torch.autograd.grad``, so that no ``.grad`` and no hook on it sees them.
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
    wrappers = wrappers_of(_WHERE, model)
    if draws < 2:
        raise ValueError(
            f"{_WHERE}: draws must be at least 2, or there is no variance to take off, got {draws}")
    named = named_parameters(_WHERE, model)

    def checked(model: nn.Module, *arguments: Any) -> Tensor:
        return checked_loss(f"{_WHERE}: run", run(model, *arguments))

    moments = [Moments() for _ in named]
    cosines = Cosines()
    with unchanged(model, wrappers, seed) as restore, torch.enable_grad():
        points = [()] if batches is None else ((batch,) for batch in apart(batches))
        for number, arguments in enumerate(points, start=1):
            restore()
            with exact_policy(wrappers):
                exact, loss = gradients_of(checked, model, named, arguments)
            _check_finite(exact, named)
            for of_one, gradient in zip(moments, exact):
                of_one.start(gradient)
            for _ in _bar(range(draws), progress, f"batch {number}"):
                restore()
                gradients, again = gradients_of(checked, model, named, arguments)
                _check_same_loss(loss, again)
                cosines.add([of_one.add(g) for of_one, g in zip(moments, gradients)])
            for of_one in moments:
                of_one.finish()
    if batches is not None and moments[0].exact.count < 2:
        raise ValueError(
            f"{_WHERE}: batches must yield at least 2, or there is no variance of sampling, got "
            f"{moments[0].exact.count}; leave batches out for one")
    return _summarize(list(named), [m.facts() for m in moments], cosines, draws)


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


def wrappers_of(where: str, model: nn.Module) -> list[QuantBackwardWrapper]:
    """The wrappers in a model whose gradients are to be compared.

    Raises:
        TypeError: there are none, or ``DistributedDataParallel`` is around.
    """
    wrappers = [wrapper for _, wrapper in wrappers_in(model)]
    if not wrappers:
        raise TypeError(
            f"{where}: model must be a QuantBackwardWrapper or contain one, got "
            f"{type(model).__name__}; without a wrapper every gradient is exact")
    if any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        raise TypeError(
            f"{where}: model must not be inside of DistributedDataParallel, which averages what "
            "backward leaves in .grad, and nothing is left there; pass the module that it wraps")
    return wrappers


def named_parameters(where: str, model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name.

    Raises:
        ValueError: there are none.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(f"{where}: no parameter of {type(model).__name__} requires a gradient")
    return named


def gradients_of(
        run: Callable[..., Tensor], model: nn.Module, named: dict[str, nn.Parameter],
        arguments: tuple[Any, ...] = ()) -> tuple[Sequence[Tensor], Tensor]:
    """Gradients of the parameters, zeros for those without any, and the loss."""
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
    # The forward pass is bit-identical, but on a GPU its sums may be taken in another order.
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
