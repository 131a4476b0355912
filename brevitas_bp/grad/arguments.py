"""Arguments of ``QuantGradientWrapper``: quantizers, and their settings by prefix."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from brevitas.inject import ExtendedInjector
from torch import nn

from brevitas_bp.codec import Codec
from brevitas_bp.codec.quantized import build_quantizer, tensor_quant_of
from brevitas_bp.codec.recipe import Recipe
from brevitas_bp.codec.stock import is_stateful
from brevitas_bp.errors import UnknownNameError, UnsupportedQuantizerError, nearest
from brevitas_bp.grad.control import WHERE
from brevitas_bp.grad.quantizer import GradientQuantizer

_PREFIXES = ("input_grad_", "weight_grad_")


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings of the two quantizers, without their prefixes.

    Raises:
        UnknownNameError: a name has neither prefix.
    """
    parts: tuple[dict[str, Any], ...] = ({}, {})
    for name, setting in settings.items():
        for prefix, part in zip(_PREFIXES, parts):
            if name.startswith(prefix):
                part[name.removeprefix(prefix)] = setting
                break
        else:
            known = ["overrides", "seed", "rank", "module", "input_grad_quant", "weight_grad_quant",
                     *(prefix + name for prefix in _PREFIXES)]
            raise UnknownNameError(
                f"{WHERE}: there is no argument {name!r}{nearest(name, known)}; settings of quantizers "
                "begin with input_grad_ or weight_grad_")
    return parts[0], parts[1]


class Factory:
    """Makes the quantizer of each layer: layers share nothing that a config builds.

    Args:
        where: the argument that holds the quantizer.
        quantizer: a config, a proxy, a ``tensor_quant`` module, a codec, or None.
        settings: of the config.
    """

    def __init__(self, where: str, quantizer: Any, settings: dict[str, Any]) -> None:
        self.where = f"{WHERE}: {where}"
        self.quantizer = quantizer
        self.settings = settings
        self._check()

    def __call__(self) -> GradientQuantizer | None:
        """Builds the quantizer of one layer; None leaves the gradient exact."""
        given = self.quantizer
        if given is None:
            return None
        if isinstance(given, Codec):
            return GradientQuantizer(given, given.name)
        if isinstance(given, nn.Module):
            module = tensor_quant_of(given) if hasattr(given, "fused_activation_quant_proxy") else given
            return GradientQuantizer(module, type(given).__name__)
        # Constants are read on the host, whatever the default device is.
        with torch.device("cpu"):
            module = build_quantizer(self.where, Recipe(given, self.settings))
        width = self.settings.get("bit_width")
        name = given.__name__ + (f", {width} bits" if width else "")
        if is_stateful(module):
            raise UnsupportedQuantizerError(
                f"{self.where}: {name} keeps statistics of earlier calls, which would be in no "
                "state_dict and would clip gradients that grow; use a quantizer whose scale follows "
                "from the tensor (Dynamic in its name), for instance one of brevitas_bp.quant")
        return GradientQuantizer(module, name)

    def with_width(self, where: str, bits: int) -> "Factory":
        """Returns a factory of quantizers with other widths.

        Raises:
            TypeError: the quantizer is built already.
        """
        if self.quantizer is None:
            return self
        if not _is_config(self.quantizer):
            raise TypeError(
                f"{WHERE}: {where}={bits} is a width, but the quantizer is built already; pass its "
                "config class instead")
        return Factory(where, self.quantizer, self.settings | {"bit_width": bits})

    def _check(self) -> None:
        given = self.quantizer
        if given is None and self.settings:
            raise TypeError(
                f"{self.where}=None keeps gradients exact, so the settings {sorted(self.settings)} "
                "would do nothing; remove them or pass a quantizer")
        if _is_config(given):
            built = self()
            assert built is not None
            _try(self.where, built)
        elif given is not None and not isinstance(given, (Codec, nn.Module)):
            raise TypeError(
                f"{self.where} must be a Brevitas config class, a proxy, a tensor_quant module, a codec "
                f"or None, got {given!r}; ready-made configs are in brevitas_bp.quant")
        elif self.settings:
            raise TypeError(
                f"{self.where} is built already, so the settings {sorted(self.settings)} would do "
                "nothing; pass its config class instead")


def _try(where: str, quantizer: GradientQuantizer) -> None:
    """Rounds a small matrix: negative values must stay negative, and Inf must not become finite.

    Raises:
        UnsupportedQuantizerError: the quantizer would lose what a gradient has.
    """
    x = torch.linspace(-1, 1, 256, device="cpu").view(4, 64)
    infinite = x.index_fill(1, torch.tensor([5]), torch.inf)
    try:
        values, hidden = quantizer(x, 0), quantizer(infinite, 0).isfinite().all()
    except Exception:  # It may need more dimensions. This check does not judge that.
        return
    if not bool((values[x < -0.5] < 0).any()):
        raise UnsupportedQuantizerError(
            f"{where}: {quantizer.name} has no negative values, and gradients have both signs; use a "
            "signed quantizer, or one with a zero point (Shifted in its name)")
    if bool(hidden):
        raise UnsupportedQuantizerError(
            f"{where}: {quantizer.name} turns an infinite gradient into finite ones, so a loss scaler "
            "would not see it; use for instance one of brevitas_bp.quant")


def _is_config(quantizer: Any) -> bool:
    return inspect.isclass(quantizer) and issubclass(quantizer, ExtendedInjector)
