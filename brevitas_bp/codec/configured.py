"""The configured codec, which can be built again with other settings."""

from typing import Any

from brevitas_bp.codec.base import Codec
from brevitas_bp.codec.quantized import codec_from
from brevitas_bp.core.bit_width import TwoBitWidthSelector, selectors

_WHERE = "brevitas_bp.QuantBackwardWrapper.configure"


class ConfiguredCodec:
    """A codec, and the recipe from which it can be built again.

    Args:
        codec: the codec as the user configured it; None keeps tensors exact.
    """

    def __init__(self, codec: Codec | None) -> None:
        self.codec = codec
        self._recipe = None if codec is None else codec.recipe
        self._settings: dict[str, Any] = {}

    @property
    def is_exact(self) -> bool:
        """Whether tensors are kept exact, so that there is nothing to configure."""
        return self.codec is None

    def configure(self, settings: dict[str, Any]) -> None:
        """Replaces the codec by one with these settings too; existing payloads keep their codec."""
        if settings == self._settings:
            return
        mixing = self._selectors_to_move(settings)
        for selector in mixing:
            selector.set_mix_prob(settings["mix_prob"])
        if not mixing:
            self.codec = self.built(settings)
        self._settings = dict(settings)

    def built(self, settings: dict[str, Any]) -> Codec:
        """Returns a new codec with the user's settings, overridden or extended by ``settings``.

        Raises:
            TypeError: there is no config class.
            UnknownNameError: the quantizer does not know a setting.
        """
        if self._recipe is None:
            kind = "None: tensors are kept exact" if self.codec is None else (
                f"{self.codec.name!r}, built before it was handed over")
            raise TypeError(
                f"{_WHERE}: the settings {sorted(settings)} would do nothing, because act_quant is "
                f"{kind}; pass the quantizer's config class")
        return codec_from(self._recipe.config, **self._recipe.settings | settings)

    def _selectors_to_move(self, settings: dict[str, Any]) -> list[TwoBitWidthSelector]:
        """Returns the codec's selectors if only their probability changes, so no new codec is needed."""
        others = [{k: v for k, v in s.items() if k != "mix_prob"} for s in (settings, self._settings)]
        # Codecs of later sites would still be built with the old probability.
        if self.codec is None or self.codec.per_site or (
                "mix_prob" not in settings or others[0] != others[1]):
            return []
        return [part for quantizer in self.codec.quantizers() for part in selectors(quantizer)]
