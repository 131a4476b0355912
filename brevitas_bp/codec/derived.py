"""Makes codecs from another codec, each of them once.

Saved-tensor hooks share an encoding of a tensor only if its codec is the same object. If each request
made a new 4-bit variant of a codec, a tensor that two operations save would be encoded twice.
"""

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, final
from weakref import WeakKeyDictionary

_Made = TypeVar("_Made")
_UNKNOWN: Any = object()
_ITSELF: Any = object()


@final
class MadeOnce:
    """A table: codec and key -> object made from the codec.

    An entry lives as long as the codec that it was made from. So the made object must not hold that
    codec; it holds the parts of the codec instead. Threads may share a table.

    Args:
        most: entries of a codec, after which the table of that codec begins anew.

    >>> table, source = MadeOnce(), MadeOnce()
    >>> table.get(source, 4, MadeOnce) is table.get(source, 4, MadeOnce)
    True
    """

    def __init__(self, most: int | None = None) -> None:
        self._made: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()
        self._most = most
        self._lock = threading.RLock()

    def get(self, source: Any, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """Returns what ``make`` returned at the first request for ``key``, perhaps ``source`` itself."""
        made = self._made.get(source)
        found = _UNKNOWN if made is None else made.get(key, _UNKNOWN)
        if found is _UNKNOWN:
            found = self._add(source, key, make)
        return source if found is _ITSELF else found

    def _add(self, source: Any, key: Hashable, make: Callable[[], Any]) -> Any:
        with self._lock:
            made = self._made.setdefault(source, {})
            if key not in made:
                if self._most is not None and len(made) >= self._most:
                    made.clear()
                found = make()
                # An entry that held its own key would keep the key alive forever.
                made[key] = _ITSELF if found is source else found
            return made[key]

    def has(self, source: Any, made: Any) -> bool:
        """Whether ``made`` was made from ``source``."""
        with self._lock:
            return any(made is one for one in self._made.get(source, {}).values())


#: Codecs with other widths; see :meth:`brevitas_bp.codec.base.Codec.variant`.
variants = MadeOnce()
#: Codecs whose buckets end with rows; see :func:`brevitas_bp.codec.rows.in_rows`.
#: Networks have few lengths of rows, but inputs of ever new sizes would add one after another.
rows = MadeOnce(most=1024)
