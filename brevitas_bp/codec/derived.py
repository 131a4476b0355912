"""Makes codecs from another codec, each of them once.

Saved-tensor hooks share an encoding of a tensor only if its codec is the same object. If each request
made a new 4-bit variant of a codec, a tensor that two operations save would be encoded twice.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, final
from weakref import WeakKeyDictionary

_Made = TypeVar("_Made")
_UNKNOWN: Any = object()
_ITSELF: Any = object()
# Limit of a table. Networks have few row lengths, but inputs of ever new sizes keep adding some.
_MOST = 1024


@final
class MadeOnce:
    """A table: codec and key -> object made from the codec.

    An entry lives as long as the codec that it was made from. So the made object must not hold that
    codec; it holds the parts of the codec instead.

    >>> table, source = MadeOnce(), MadeOnce()
    >>> table.get(source, 4, MadeOnce) is table.get(source, 4, MadeOnce)
    True
    """

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()

    def get(self, source: Any, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """Returns what ``make`` returned at the first request for ``key``, perhaps ``source`` itself."""
        made = self._made.get(source)
        if made is None or len(made) > _MOST:
            made = self._made[source] = {}
        found = made.get(key, _UNKNOWN)
        if found is _UNKNOWN:
            found = make()
            # An entry that held its own key would keep the key alive forever.
            made[key] = _ITSELF if found is source else found
        return source if found is _ITSELF else found

    def has(self, source: Any, made: Any) -> bool:
        """Whether ``made`` was made from ``source``."""
        return any(made is one for one in self._made.get(source, {}).values())


#: Codecs with other widths; see :meth:`brevitas_bp.codec.base.Codec.variant`.
variants = MadeOnce()
#: Codecs whose buckets end with rows; see :func:`brevitas_bp.codec.rows.in_rows`.
rows = MadeOnce()
