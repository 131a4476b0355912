"""What a codec was built from, so that it can be built again."""

import sys
from typing import Any, final

from brevitas_bp.errors import UnsupportedQuantizerError


@final
class Recipe:
    """A config class and settings of it. Immutable.

    Pickles where the class can be imported. One that was defined in a function cannot: then the copy
    knows its name, and raises when something is to be built from it.

    Args:
        config: an injector class, or after unpickling perhaps its name.
        settings: keywords of a Brevitas layer.
    """

    def __init__(self, config: Any, settings: dict[str, Any]) -> None:
        self._config = config
        self.settings = dict(settings)

    @property
    def config(self) -> Any:
        """The injector class.

        Raises:
            UnsupportedQuantizerError: it was lost in pickling.
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
