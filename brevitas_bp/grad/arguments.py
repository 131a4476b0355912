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
from brevitas_bp.errors import UnknownNameError, nearest
from brevitas_bp.grad.layers import WHERE
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
        return GradientQuantizer(module, given.__name__ + (f", {width} bits" if width else ""))

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
            self()
        elif given is not None and not isinstance(given, (Codec, nn.Module)):
            raise TypeError(
                f"{self.where} must be a Brevitas config class, a proxy, a tensor_quant module, a codec "
                f"or None, got {given!r}; ready-made configs are in brevitas_bp.quant")
        elif self.settings:
            raise TypeError(
                f"{self.where} is built already, so the settings {sorted(self.settings)} would do "
                "nothing; pass its config class instead")


def _is_config(quantizer: Any) -> bool:
    return inspect.isclass(quantizer) and issubclass(quantizer, ExtendedInjector)
