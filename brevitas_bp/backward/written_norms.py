"""Recognises norms that are written out, such as the RMS norm of language models.

NOTE [ Norms that are written out ]
1. ``x * rsqrt(mean(x ** 2, -1, keepdim=True) + eps)`` saves ``x`` for the square and for the product.
   A rounding of ``x`` reaches the gradient of ``x`` as in a norm: weakly, because the gradient of each
   statistic sums over a row. So ``x`` is stored as the input of a norm, once.
2. What a square is for shows only in the next operation. So the pack hook waits for it. If it averages
   the squares over the last dimension, and keeps the dimension, the square belongs to a norm.
3. The product, or quotient, belongs to the same norm if its other factor was computed from these
   squares alone. The nodes of autograd's graph tell.
"""

from typing import Any

from torch import Tensor

from brevitas_bp.backward.origins import rounded_by
from brevitas_bp.backward.rows import LEAST_ROW
from brevitas_bp.backward.saved import NO_CALL, Call, place_of
from brevitas_bp.backward.views import kind_of

_AVERAGES = frozenset({"mean", "sum"})
# Nodes between the squares and the factor: mean, epsilon, root, reciprocal, casts.
_STEPS = frozenset({
    "Mean", "Sum", "Add", "Rsqrt", "Sqrt", "Reciprocal", "Pow", "Div", "ToCopy", "Clamp", "ClampMin",
    "Unsqueeze", "View", "Expand"})
_MOST_STEPS = 10


def averages_rows(call: Call, x: Tensor) -> bool:
    """Whether a call averages or sums the squares of ``x`` over its last dimension, for a norm.

    A norm keeps the dimension, since the statistic goes back into a product with ``x``. A distance does
    not. Rows that are short share buckets, and their bias would be large.
    """
    squares = call.argument(0, "input")
    if call is NO_CALL or call.name not in _AVERAGES or not isinstance(squares, Tensor):
        return False
    dims, node = call.argument(1, "dim"), squares.grad_fn
    listed = [dims] if isinstance(dims, int) else dims
    return (
        squares.shape == x.shape and isinstance(listed, (list, tuple)) and len(listed) == 1
        and listed[0] in (-1, x.dim() - 1) and call.argument(2, "keepdim", False) is True
        and x.shape[-1] >= LEAST_ROW and node is not None and rounded_by(node, place_of(x))
        and _squares(node))


def is_statistic_of(x: Tensor, factor: Tensor) -> bool:
    """Whether a factor was computed from squares of ``x``, one number for each row of ``x``."""
    if x.dim() == 0 or factor.dim() == 0 or x.shape[-1] < LEAST_ROW or not (
            factor.shape[-1] == 1 or factor.stride(-1) == 0):
        return False
    place = place_of(x)
    node: Any = factor.grad_fn
    for _ in range(_MOST_STEPS):
        if node is None:
            return False
        if rounded_by(node, place):
            return _squares(node)
        if kind_of(node) not in _STEPS:
            return False
        sources = [source for source, _ in node.next_functions if source is not None]
        if len(sources) != 1:
            return False
        node = sources[0]
    return False


def _squares(node: Any) -> bool:
    """Whether a node's operation sums squares, or multiplies a tensor by itself."""
    sources = node.next_functions
    return kind_of(node) in ("Pow", "LinalgVectorNorm") or (
        kind_of(node) == "Mul" and len(sources) == 2 and sources[0] == sources[1])
