"""The recipe of a codec, from which the codec can be built again."""

import sys
from typing import Any, final

from brevitas_bp.errors import UnsupportedQuantizerError


@final
class Recipe:
    """A config class and its settings. Immutable.

    It pickles the class if the class can be imported. A class that was defined in a function cannot be
    imported. The unpickled recipe then knows only the name of the class, and raises when something is to
    be built from it.

    Args:
        config: an injector class; after unpickling perhaps only its name.
        settings: keywords of a Brevitas layer.
    """

    def __init__(self, config: Any, settings: dict[str, Any]) -> None:
        self._config = config
        self.settings = dict(settings)

    @property
    def config(self) -> Any:
        """The injector class.

        Raises:
            UnsupportedQuantizerError: the class was lost in pickling.
        """
        if isinstance(self._config, str):
            raise UnsupportedQuantizerError(
                f"brevitas_bp.codec: the config class {self._config} was not pickled with its "
                "quantizer, because it cannot be imported, so nothing new can be built from it; define "
                "it at the top level of a module")
        return self._config

    def __reduce__(self) -> tuple[Any, ...]:
        config = self._config
        if not isinstance(config, str) and not _is_importable(config):
            config = config.__qualname__
        return Recipe, (config, self.settings)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recipe":
        return self


def _is_importable(config: Any) -> bool:
    found: Any = sys.modules.get(config.__module__)
    for name in config.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is config
