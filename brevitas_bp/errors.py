"""Exceptions of the package (leaf module: it imports nothing of ours).

Every message says where, what was expected, what came and what to do. ``ValueError`` and
``TypeError`` are raised as they are where a plain argument is wrong; the classes below name
the failures that a user may want to catch.
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
    """A tensor of a dtype that a codec could not restore."""


class ModifiedInPlaceError(BrevitasBpError, RuntimeError):
    """A tensor that was kept for backward has been modified by an in-place operation."""


class SecondDerivativeError(BrevitasBpError, RuntimeError):
    """A second derivative through an operation of which only the first derivative was stored."""


class CorruptPayloadError(BrevitasBpError, RuntimeError):
    """A packed payload whose bytes do not fit the facts stored beside them."""


class InfeasibleBudgetError(BrevitasBpError, ValueError):
    """A budget below what the smallest choice takes."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the closest candidate, or an empty string.

    >>> nearest("bucket_sise", ["bit_width", "bucket_size"])
    "; did you mean 'bucket_size'?"
    """
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""
