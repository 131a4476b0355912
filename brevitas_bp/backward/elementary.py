"""Rules for functions such as ``log`` and ``exp``, whose derivative spans orders of magnitude.

NOTE [ Derivatives of any size ]
1. Codes with equal steps round a derivative relative to the largest one of its bucket. The gradient that
   comes in may be small where the derivative is large: in ``p * log(p)``, it is ``p``, and the
   derivative is ``1 / p``. The error would then have no bound. So each element gets a relative error
   (:class:`~brevitas_bp.codec.relative.RelativeCodec`).
2. torch's own backward runs, from a tensor that is decoded from the derivative
   (:mod:`~brevitas_bp.activations.forms`).
3. ``exp`` saves its output, which is its derivative. The operations after it may share the encoding.
4. The tensor waits for the next call. If that call keeps it exact, so does the function: it takes no
   bytes then.
5. A product ``p * log(p)`` multiplies a rounding of ``p`` by ``1 / p``. So that factor has a relative
   error too (:func:`divides_by`).
6. A statistic, one number for each row, stays exact. It has few bytes and reaches many gradients.
"""

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from brevitas_bp.activations.forms import OF_INPUT, OF_OUTPUT, Form, of_power
from brevitas_bp.backward import rewrites
from brevitas_bp.backward.origins import rounded_by
from brevitas_bp.backward.registry import rule_of
from brevitas_bp.backward.saved import (
    Call,
    Decision,
    SavedTensor,
    place_of,
    tensors_in,
)
from brevitas_bp.backward.views import kind_of
from brevitas_bp.codec.base import FLOATS
from brevitas_bp.codec.shape_only import shape_only

# Functions that save their output, which is their derivative up to a constant.
_EXPONENTIALS = frozenset({"exp", "exp2"})
_QUOTIENTS = frozenset({"div", "divide", "true_divide", "truediv", "itruediv", "idiv"})
_LOGARITHMS = frozenset({"Log", "Log2", "Log10"})
# The search for such a node ends after so many nodes.
_MOST_NODES = 16

_CURVED = Decision(None, "not linear in what is saved")
_OTHER = Decision(None, "not a floating-point tensor")
_SMALL = Decision(None, "few elements: a statistic, perhaps")
_STATISTIC = Decision(None, "one number for each row: few bytes, many gradients")
_NEXT = Decision(None, "the next operation keeps it exact")
_NO_CODE = Decision(None, "its derivative has any size: the quantizer has no code with a relative error")
_SHAPE = Decision(shape_only(), "only its shape is read")
_REASON = "its derivative, with a relative error: backward is linear in it"


def elementary(saved: SavedTensor) -> Decision:
    """Decides for the input or output of an elementary function."""
    name = _name(saved.call)
    if saved.tensor.dtype not in FLOATS:
        return _OTHER
    if name in _EXPONENTIALS:
        return _relative(saved, None)
    if name == "pow" and saved.call.argument(1, "exponent") == 0:
        return _SHAPE
    if form_of(saved.call) is None or len(list(tensors_in(saved.arguments))) > 1:
        # ``1 / x`` with another tensor in place of 1 is two operations.
        return _CURVED
    return _relative(saved, "derivative")


def power_of_a_number(saved: SavedTensor, base: object, exponent: Tensor) -> Decision:
    """Decides for ``base ** exponent``: backward needs the output, and of the exponent the shape."""
    if saved.tensor.dtype not in FLOATS:
        return _OTHER
    if not isinstance(base, (int, float)) or base == 0:
        return _CURVED
    return _SHAPE if saved.aliases(exponent) else _relative(saved, None)


def form_of(call: Call) -> Form | None:
    """Returns the form of the tensor that a function saves; None if it has none."""
    name = _name(call)
    if name == "pow":
        exponent = call.argument(1, "exponent")
        return of_power(float(exponent)) if isinstance(exponent, (int, float)) else None
    return OF_INPUT.get(name) or OF_OUTPUT.get(name)


def _name(call: Call) -> str:
    """Returns the name of the function, without underscores; ``1 / x`` is a reciprocal."""
    name = call.name.strip("_").removeprefix("special_")
    return "reciprocal" if name in ("rdiv", "rtruediv") else name


def divides_by(x: Tensor, factor: Tensor) -> bool:
    """Whether a gradient of ``factor`` is soon divided by ``x``, as that of ``log(x)`` is.

    Only operations that saved ``x`` itself count.
    """
    place, seen, level = place_of(x), 0, [factor.grad_fn]
    while level and seen < _MOST_NODES:
        seen += len(level)
        if any(_divides(node) and rounded_by(node, place) for node in level if node):
            return True
        level = [source for node in level if node for source, _ in node.next_functions]
    return False


def _divides(node: Any) -> bool:
    """Whether the derivative at a node is large where the node's input is small."""
    kind = kind_of(node)
    return kind in _LOGARITHMS or (kind == "Pow" and getattr(node, "_saved_exponent", 0) < 1)


def relative_to_itself(saved: SavedTensor, reason: str) -> Decision:
    """Returns the decision for a tensor each of whose elements needs an error relative to itself."""
    codec = None if saved.codec is None else saved.codec.per_element.for_magnitudes
    return _NO_CODE if codec is None else Decision(codec, reason, shared=False, reach="all")


def _relative(saved: SavedTensor, units: Literal["derivative"] | None) -> Decision:
    x = saved.tensor
    if x.numel() < rewrites.SMALLEST:
        return _SMALL
    if x.dim() > 1 and x.shape[-1] == 1:
        return _STATISTIC
    if saved.following is not None and _keeps_exact(saved.following, saved):
        return _NEXT
    decision = relative_to_itself(saved, _REASON)
    if decision.codec is None:
        return decision
    return decision._replace(shared=units is None, units=units, waits=saved.following is None)


def _keeps_exact(following: Call, saved: SavedTensor) -> bool:
    """Whether the next call saves the tensor as well, and its rule keeps it."""
    if not (following.is_product or following.name.strip("_") in _QUOTIENTS):
        return False
    mine = [saved.aliases(t) for t in tensors_in(following.arguments)]
    others = [
        t for t, is_mine in zip(tensors_in(following.arguments), mine, strict=True) if not is_mine]
    if not any(mine) or (following.is_product and not any(t.requires_grad for t in others)):
        return False
    rule = rule_of(following.function)
    return rule is not None and rule.decide(
        replace(saved, call=following, op=following.name, following=None)).codec is None
