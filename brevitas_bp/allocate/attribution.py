"""Which layer's rounding makes which noise in the gradient."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from brevitas_bp.allocate.gradient_error import (
    gradients_of,
    named_parameters,
    refuse_parallel,
    wrappers_of,
)
from brevitas_bp.allocate.loss import checked_loss
from brevitas_bp.allocate.moments import real
from brevitas_bp.allocate.sources import Kind, Roundings
from brevitas_bp.allocate.unchanged import unchanged
from brevitas_bp.text import table

_WHERE = "brevitas_bp.allocate.attribute_noise"


@dataclass(frozen=True)
class NoiseOfPlace:
    """The noise that one module's roundings make, with everything else exact.

    Attributes:
        kind: "activations" or "gradients".
        module: qualified name of the module that rounds.
        variance: ``E |g~ - g|^2`` over all parameters.
        by_module: the same for the parameters of each module that has any noise.
    """

    kind: Kind
    module: str
    variance: float
    by_module: dict[str, float]


@dataclass(frozen=True)
class NoiseSources:
    """The result of :func:`attribute_noise`. ``print`` it for a table, most noise first.

    Attributes:
        places: one for each module that rounds.
        together: ``E |g~ - g|^2`` with everything rounded at once.
        size: ``|g|`` of the exact gradient.
        draws: draws for each place.
    """

    places: list[NoiseOfPlace]
    together: float
    size: float
    draws: int
    shown: int = field(default=20, repr=False)

    @property
    def sum(self) -> float:
        """Sum of the places' variances. Independent noise adds up: it is near :attr:`together`."""
        return sum(place.variance for place in self.places)

    def __str__(self) -> str:
        lines = [("module that rounds", "what", "noise", "share", "most of it in")]
        ordered = sorted(self.places, key=lambda p: -p.variance)
        for place in ordered[:self.shown]:
            worst = max(place.by_module, key=place.by_module.__getitem__, default="-")
            lines.append((
                place.module or "(root)", place.kind, self._noise(place.variance),
                f"{place.variance / self.sum:.1%}" if self.sum else "-", worst or "(root)"))
        hidden = ordered[self.shown:]
        if hidden:
            rest = sum(p.variance for p in hidden)
            lines.append((f"{len(hidden)} more", "", self._noise(rest), f"{rest / self.sum:.1%}", ""))
        lines.append(("all at once", "", self._noise(self.together), "", ""))
        return table(lines, left=2, total=True)

    def _noise(self, variance: float) -> str:
        return f"{variance**0.5 / self.size:.4f}" if self.size else "-"


def attribute_noise(
        model: nn.Module, run: Callable[[Any], Tensor], *, draws: int = 8,
        seed: int = 0) -> NoiseSources:
    """Measures, for each module that rounds, the noise that its roundings alone make.

    The rounding of a gradient that enters the product for a weight makes noise in that weight only. The
    rounding of a gradient that enters the product for the input makes noise in every layer before.

    Noise is ``sqrt(E |g~ - g|^2) / |g|``, for the whole gradient. A bias counts as noise here. A tensor
    that several modules save has no noise as long as one of them keeps it exact. So its noise is part of
    "all at once", but of no place.

    The model and torch's random state are left unchanged. Cost: one forward and backward pass for each
    place and draw.

    Args:
        model: a ``QuantBackwardWrapper``, a ``QuantGradientWrapper``, or a module with wrappers inside.
        run: ``run(model)``; it runs the module and returns the loss, without backward.
        draws: gradients for each place.
        seed: of the roundings.

    Raises:
        TypeError: the model has no wrapper.
        ValueError: ``draws`` is below 1, or a loss that is no scalar or has no gradient.

    Source: Chen et al., "A Statistical Framework for Low-bitwidth Training of Deep
    Neural Networks", 2020: the noise of all layers adds up.

    Example:
        >>> from brevitas_bp.grad import QuantGradientWrapper
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> x = torch.randn(256, 64)
        >>> noise = attribute_noise(
        ...     QuantGradientWrapper(net, input_grad_bit_width=4), lambda m: m(x).logsumexp(1).mean())
        >>> [(place.kind, place.module) for place in noise.places]
        [('gradients', '0'), ('gradients', '2')]
    """
    if draws < 1:
        raise ValueError(f"{_WHERE}: draws must be at least 1, got {draws}")
    roundings = Roundings(model)
    refuse_parallel(_WHERE, model)
    if not roundings.gradients:
        wrappers_of(_WHERE, model)
    named = named_parameters(_WHERE, model)

    def checked(model: nn.Module) -> Tensor:
        return checked_loss(f"{_WHERE}: run", run(model))

    with unchanged(model, roundings.saved, seed, rounded_gradients=True) as restore, torch.enable_grad():

        def gradients() -> list[Tensor]:
            restore()
            return [real(g) for g in gradients_of(checked, model, named)[0]]

        with roundings.only(None):
            exact = gradients()

        def noise() -> dict[str, float]:
            found: dict[str, float] = {}
            for _ in range(draws):
                for name, g, e in zip(named, gradients(), exact):
                    module = name.rpartition(".")[0]
                    found[module] = found.get(module, 0.0) + float((g - e).square().sum()) / draws
            return {module: variance for module, variance in found.items() if variance}

        places, size = [], sum(float(e.square().sum()) for e in exact)**0.5
        for place in roundings.places(lambda: checked(model)):
            with roundings.only(place):
                by_module = noise()
            places.append(NoiseOfPlace(
                place.kind, place.name, sum(by_module.values()), by_module))
        return NoiseSources(places, sum(noise().values()), size, draws)
