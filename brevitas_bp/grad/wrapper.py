"""``QuantGradientWrapper``: rounds the gradients that enter the products of backward."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from brevitas_bp.backward.arguments import selects
from brevitas_bp.backward.transparent import Transparent
from brevitas_bp.errors import UnknownNameError, nearest
from brevitas_bp.grad.arguments import Factory, split_settings
from brevitas_bp.grad.control import WHERE, Control
from brevitas_bp.grad.layers import LayerRounding, convert, restore, rounding_of
from brevitas_bp.quant.grad import (
    ShiftedUint8DynamicGradPerRowFloatStochastic,
    ShiftedUint8DynamicGradPerTensorFloatStochastic,
)
from brevitas_bp.text import table

#: Layers whose products round.
LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
    nn.ConvTranspose3d)


class QuantGradientWrapper(Transparent):
    """Runs a module, and rounds the gradients that enter the products of its layers in backward.

    The layers are every ``nn.Linear``, convolution and transposed convolution in the module, of torch or
    of Brevitas. In backward, the gradient D of such a layer's output enters two products. Each gets its
    own rounding of D::

        gradient of the weight = Q_weight(D)^T x     (and of the bias: the sum of Q_weight(D))
        gradient of the input  = Q_input(D) W

    Everything else in backward is exact. With unbiased quantizers, the *expected* gradient of every
    parameter is the gradient without rounding, because backward is linear in D. Together with Brevitas'
    quantizers of weights and activations this is fully quantized training. The products run in floating
    point: this wrapper shows what rounding does to training, and saves neither memory nor time.

    The layers are changed in place, as by ``torch.nn.utils.parametrize``: they round whoever calls them,
    until :meth:`unwrap`. So layers that checkpointing runs again round too. Parameters, names and
    ``state_dict`` stay as they are, and so do all bits of the forward pass and torch's random state.

    ``QuantBackwardWrapper`` may be inside or around: it then stores the activations in a few bits.

    Source: Chen et al., "A Statistical Framework for Low-bitwidth Training of Deep Neural Networks",
    2020.

    Args:
        module: the module to run. Layers inside ``nn.MultiheadAttention``, and recurrent layers, stay
            exact.
        input_grad_quant: Q_input: any Brevitas activation quantizer, an injector class or a proxy; a
            codec; or None for exact. A linear layer gives it a matrix [rows, features], a convolution
            [samples, channels, ...].
        weight_grad_quant: Q_weight, likewise.
        overrides: glob over qualified names of modules -> quantizer for both, a pair (for the input, for
            the weight), bits for both, or None (exact); the first pattern that matches a layer, or a
            module around it, wins.
        seed: seed of the private noise stream; None derives it from ``torch.initial_seed()``.
        rank: as of ``QuantBackwardWrapper``.
        **settings: settings of the quantizers, with the prefix ``input_grad_`` or ``weight_grad_``, for
            instance ``input_grad_bit_width=4``.

    Raises:
        TypeError: ``module`` is no module, or an argument has the wrong kind.
        ValueError: the module has no layer to convert, or a layer that is converted already.
        UnknownNameError: a setting that the quantizer does not know, or a pattern that matches no layer.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> model = QuantGradientWrapper(net, input_grad_bit_width=4, overrides={"2": None})
        >>> model(torch.randn(128, 64)).sum().backward()
        >>> model.explain().splitlines()[-1].split()
        ['2', 'Linear', 'exact', 'exact']
    """

    def __init__(
            self,
            module: nn.Module,
            input_grad_quant: Any = ShiftedUint8DynamicGradPerRowFloatStochastic,
            weight_grad_quant: Any = ShiftedUint8DynamicGradPerTensorFloatStochastic,
            *,
            overrides: Mapping[str, Any] | None = None,
            seed: int | None = None,
            rank: int | None = None,
            **settings: Any) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"{WHERE}: module must be a torch.nn.Module instance, got {module!r}")
        for name, number in (("seed", seed), ("rank", rank)):
            if not (number is None or isinstance(number, int)):
                raise TypeError(f"{WHERE}: {name} must be an integer or None, got {number!r}")
        for_input, for_weight = split_settings(settings)
        default = (
            Factory("input_grad_quant", input_grad_quant, for_input),
            Factory("weight_grad_quant", weight_grad_quant, for_weight))
        layers = _layers_of(module)
        chosen = _overrides(overrides or {}, default, list(layers))
        self._control = Control.seeded(seed, rank)
        roundings: dict[str, LayerRounding] = {}
        for name, layer in layers.items():
            first, second = next(
                (pair for pattern, pair in chosen if selects(pattern, name)), default)
            rounding = LayerRounding(name, self._control, first(), second())
            # A layer inside a layer that rounds needs a rounding of its own, to stay exact.
            if not rounding.exact or any(_contains(outer, name) for outer in roundings):
                _check_layer(name, layer)
                roundings[name] = rounding
        # Nothing has been changed so far: an error leaves the module as it was.
        for name, rounding in roundings.items():
            convert(layers[name], rounding)
        self._stand_for(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module."""
        return self.module(*args, **kwargs)

    def explain(self) -> str:
        """Returns a table: each layer, and what rounds its gradient."""
        rows = [("layer", "kind", "for the input", "for the weight and bias")]
        for name, layer in _layers_of(self.module).items():
            rounding = rounding_of(layer)
            first, second = (None, None) if rounding is None else (
                rounding.for_input, rounding.for_weight)
            rows.append((
                name or "(root)", type(layer).__name__, "exact" if first is None else first.name,
                "exact" if second is None else second.name))
        return table(rows, left=4)

    def rounded_layers(self) -> list[str]:
        """Returns the names of the layers whose gradients are rounded."""
        layers = _layers_of(self.module).items()
        roundings = ((name, rounding_of(layer)) for name, layer in layers)
        return [name for name, rounding in roundings if rounding is not None and not rounding.exact]

    def unwrap(self) -> nn.Module:
        """Returns the module, with its layers as they were before."""
        for layer in _layers_of(self.module).values():
            if (rounding := rounding_of(layer)) is not None and rounding.control is self._control:
                restore(layer)
        return self.module

    def noise_state(self) -> dict[str, int]:
        """Returns the state of the private noise stream, for a checkpoint that resumes bit for bit."""
        return self._control.noise.stream.state()

    def set_noise_state(self, state: dict[str, int]) -> None:
        """Continues the noise stream from :meth:`noise_state`."""
        self._control.noise.stream.set_state(state)


def control_of(wrapper: QuantGradientWrapper) -> Control:
    """Returns what the layers of a wrapper share."""
    return wrapper._control


def _layers_of(root: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module for name, module in root.named_modules()
        # The product of this layer runs inside of nn.MultiheadAttention.
        if isinstance(module, LAYERS) and not isinstance(module, NonDynamicallyQuantizableLinear)}


def _contains(outer: str, name: str) -> bool:
    return name.startswith(f"{outer}." if outer else "") and name != outer


def _check_layer(name: str, layer: nn.Module) -> None:
    if rounding_of(layer) is not None:
        raise ValueError(
            f"{WHERE}: layer {name!r} already rounds its gradients for another wrapper; unwrap() that "
            "one first, or wrap once and use overrides")
    if "forward" in vars(layer):
        raise ValueError(
            f"{WHERE}: layer {name!r} has a forward of its own, which another tool has put on it (hooks "
            "of accelerate do) and which would bypass the rounding; wrap first, or remove those hooks")
    if any(is_lazy(p) for p in layer.parameters()):
        raise ValueError(
            f"{WHERE}: layer {name!r} is lazy and has no shape yet; run the module once before it is "
            "wrapped")


def _overrides(
        overrides: Mapping[str, Any], default: tuple[Factory, Factory], names: list[str],
) -> list[tuple[str, tuple[Factory, Factory]]]:
    if not names:
        raise ValueError(
            f"{WHERE}: the module has no linear layer or convolution, so there is no gradient to round")
    if not isinstance(overrides, Mapping) or not all(isinstance(p, str) for p in overrides):
        raise TypeError(
            f"{WHERE}: overrides must map globs over module names to quantizers, pairs of them, bits or "
            f"None, got {overrides!r}")
    for pattern in overrides:
        if not any(selects(pattern, name) for name in names):
            raise UnknownNameError(
                f"{WHERE}: the pattern {pattern!r} in overrides matches no layer"
                f"{nearest(pattern, names)}")
    return [
        (pattern, _pair(f"overrides[{pattern!r}]", given, default))
        for pattern, given in overrides.items()]


def _pair(where: str, given: Any, default: tuple[Factory, Factory]) -> tuple[Factory, Factory]:
    if isinstance(given, int) and not isinstance(given, bool):
        first, second = default
        return first.with_width(where, given), second.with_width(where, given)
    both = given if isinstance(given, tuple) else (given, given)
    if len(both) != 2:
        raise TypeError(
            f"{WHERE}: {where} must be a quantizer, a pair (for the input, for the weight), bits or "
            f"None, got {given!r}")
    return Factory(where, both[0], {}), Factory(where, both[1], {})
