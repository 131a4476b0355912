"""The configured codec, with other settings."""

from typing import Any

from brevitas_bp.codec.base import Codec
from brevitas_bp.codec.quantized import codec_from
from brevitas_bp.core.bit_width import TwoBitWidthSelector, selectors

_WHERE = "brevitas_bp.QuantBackwardWrapper.configure"


class ConfiguredCodec:
    """A codec, and the recipe by which it is built again.

    Args:
        codec: as the user configured it; None keeps tensors exact.
    """

    def __init__(self, codec: Codec | None) -> None:
        self.codec = codec
        self._recipe = None if codec is None else codec.recipe
        self._settings: dict[str, Any] = {}

    @property
    def is_exact(self) -> bool:
        """Whether there is nothing to configure."""
        return self.codec is None

    def configure(self, settings: dict[str, Any]) -> None:
        """Replaces the codec by one that has ``settings`` too; payloads keep theirs."""
        if settings == self._settings:
            return
        mixing = self._selectors_to_move(settings)
        for selector in mixing:
            selector.set_mix_prob(settings["mix_prob"])
        if not mixing:
            self.codec = self.built(settings)
        self._settings = dict(settings)

    def built(self, settings: dict[str, Any]) -> Codec:
        """A new codec that has ``settings`` in place of, or beside, those of the user.

        Raises:
            TypeError: there is no config class.
            UnknownNameError: a setting that the quantizer does not know.
        """
        if self._recipe is None:
            kind = "None: tensors are kept exact" if self.codec is None else (
                f"{self.codec.name!r}, built before it was handed over")
            raise TypeError(
                f"{_WHERE}: the settings {sorted(settings)} would do nothing, because act_quant is "
                f"{kind}; pass the quantizer's config class")
        return codec_from(self._recipe.config, **self._recipe.settings | settings)

    def _selectors_to_move(self, settings: dict[str, Any]) -> list[TwoBitWidthSelector]:
        """Those of the codec, where its probability is all that changes: no need to build anew."""
        others = [{k: v for k, v in s.items() if k != "mix_prob"} for s in (settings, self._settings)]
        # Codecs of sites that come later would be built with the probability of before.
        if self.codec is None or self.codec.per_site or (
                "mix_prob" not in settings or others[0] != others[1]):
            return []
        return [part for quantizer in self.codec.quantizers() for part in selectors(quantizer)]
