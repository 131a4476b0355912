"""Exceptions of the package (leaf module: it imports no other module of the package).

Every message says where the error is, what was expected, what was given and what to do. A wrong plain
argument raises ``ValueError`` or ``TypeError`` itself. The classes below name the failures that a
user may want to catch.
"""

import difflib
from collections.abc import Iterable


class BrevitasBpError(Exception):
    """Base class of the package's own exceptions."""


class UnknownNameError(BrevitasBpError, ValueError):
    """A keyword, pattern or class name that matches nothing."""


class UnsupportedQuantizerError(BrevitasBpError, TypeError):
    """A Brevitas quantizer whose output cannot be stored as integer or minifloat codes."""


class UnsupportedTensorError(BrevitasBpError, TypeError):
    """A tensor whose dtype a codec cannot restore."""


class ModifiedInPlaceError(BrevitasBpError, RuntimeError):
    """An in-place operation has modified a tensor that was kept for backward."""


class SecondDerivativeError(BrevitasBpError, RuntimeError):
    """A second derivative through an operation that stored only its first derivative."""


class CorruptPayloadError(BrevitasBpError, RuntimeError):
    """A packed payload whose bytes contradict the facts stored beside them."""


class InfeasibleBudgetError(BrevitasBpError, ValueError):
    """A budget smaller than the smallest possible choice."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the closest candidate, or an empty string.

    >>> nearest("bucket_sise", ["bit_width", "bucket_size"])
    "; did you mean 'bucket_size'?"
    """
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""
