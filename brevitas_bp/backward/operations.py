"""Rules that say how the saved tensors of an operation are stored, and the registry of these rules.

Users may add rules. Stochastic rounding leaves a gradient unbiased if backward is linear in the rounded
tensor, and if no two roundings of one tensor are multiplied. Each rule says which saved tensors of its
operation meet both conditions. All others are exact, except inputs of norms (:func:`normalization`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import Tensor

from brevitas_bp.backward.location import current_location
from brevitas_bp.backward.origins import goes_through_rounding_of
from brevitas_bp.backward.parameters import is_view_or_cast_of
from brevitas_bp.backward.rewrites import SMALLEST, Rewrite, SaveDerivative, look_through
from brevitas_bp.backward.rows import (
    RowsOf,
    convolved,
    last_dimension,
    of_elements,
    of_matrix,
    shares_planes,
)
from brevitas_bp.backward.saved import (
    NO_CALL,
    Call,
    Decision,
    SavedTensor,
    is_parameter,
    own_shape,
    storage_id,
    tensors_in,
)
from brevitas_bp.codec.base import FLOATS, Codec

# A factor that is broadcast to at least this many times its size is kept. It has few bytes, and each of
# its roundings would reach many gradients.
_BROADCAST = 16

# Elements to a statistic of a norm. From _ENOUGH on, the input needs no more bits than configured; below
# _FEW, it stays exact.
_ENOUGH, _FEW = 256, 16

# If one gradient sums at least this many roundings, they need no more bits than configured.
_AVERAGED = 256

Decide = Callable[[SavedTensor], Decision]


@dataclass(frozen=True)
class OpRule:
    """How the saved tensors of one operation are stored.

    Attributes:
        decide: saved tensor -> :class:`Decision`. It is called only for tensors of numbers, and only in
            modules that have a configured codec.
        rewrite: runs the operation so that it saves something else; None runs the operation as it is.
        few_bit: call -> arguments of :func:`~brevitas_bp.activations.few_bit.few_bit_table` except the
            bits, or None if the call's arguments have no table. The attribute is None without any table.
    """

    decide: Decide
    rewrite: Rewrite | None = None
    few_bit: Callable[[Call], dict[str, Any] | None] | None = None


def exact(reason: str = "not linear in what is saved") -> OpRule:
    """Makes a rule that keeps every saved tensor as it is."""
    decision = Decision(None, reason)
    return OpRule(lambda saved: decision)


def linear(*positions: int) -> OpRule:
    """Makes a rule for a backward that is linear in its saved tensors and multiplies no two of them.

    Args:
        positions: positions of the arguments for which that is true; none means all saved tensors.
    """
    def decide(saved: SavedTensor) -> Decision:
        if positions and saved.position not in positions:
            return Decision(None, "backward is not linear in it")
        return Decision(
            saved.codec, "backward is linear in it", shared=stands_alone(saved), reach="all",
            rows=last_dimension)

    return OpRule(_floats(decide))


def weighted(weight: int = 1, rows: RowsOf = last_dimension) -> OpRule:
    """Makes a rule for a layer ``f(input, weight)``: the input is quantized, the weight is exact.

    So the gradient of the input stays exact, and roundings do not add up from layer to layer.

    Args:
        weight: position of the weight among the arguments.
        rows: finds the elements of the input that backward multiplies by the same gradients.
    """
    def decide(saved: SavedTensor) -> Decision:
        if _is_weight(saved, weight):
            return Decision(None, "weight: keeps the gradient of the input exact")
        apart = shares_planes(saved.tensor, saved.call) if rows is convolved else False
        alone = stands_alone(saved)
        factor = list(tensors_in(saved.arguments[weight:weight + 1]))
        return Decision(
            saved.codec, "input: the gradient of the weight is linear in it", rows=rows,
            units="channel" if apart else None, shared=alone,
            reach="weight" if alone else _reach(factor, saved.tensor.numel()))

    return OpRule(_floats(decide))


def _is_weight(saved: SavedTensor, weight: int) -> bool:
    """Whether a saved tensor is the weight (by memory) or a cast of the weight (by shape or history)."""
    position, x = saved.position, saved.tensor
    if position is not None:
        return position == weight
    tensors = [a for a in saved.arguments[:weight + 1] if isinstance(a, Tensor)]
    if len(tensors) <= weight or own_shape(x) != own_shape(tensors[weight]):
        return False
    if x.numel() != tensors[0].numel() or x.requires_grad != tensors[0].requires_grad:
        return True
    return is_view_or_cast_of(x, tensors[weight])


def product(summands: int = 0, rows: RowsOf = of_matrix) -> OpRule:
    """Makes a rule for a product of two tensors, elementwise or of matrices.

    The gradient of each factor is linear in the other factor. Both may depend on one input, so a factor
    shares no rounding, unless the other factor is a parameter. A widely broadcast factor is exact.

    Args:
        summands: number of arguments before the factors, to which the product is added.
        rows: finds the elements of a factor that backward multiplies by the same gradients.
    """
    def decide(saved: SavedTensor) -> Decision:
        tensors = list(tensors_in(saved.arguments[summands:]))
        size = saved.tensor.numel()
        if any(size * _BROADCAST <= a.numel() for a in tensors):
            return Decision(None, "broadcast factor: few bytes, many gradients")
        reach = _reach(tensors, size)
        return Decision(
            saved.codec, "factor: the other's gradient is linear in it", shared=reach == "weight",
            reach=reach, rows=rows)

    return OpRule(_floats(decide))


def quotient() -> OpRule:
    """Makes a rule for a quotient ``a / b``: backward is linear in ``a``, but not in ``b``.

    If the quotient has the shape of ``a``, it is stored instead of ``a``. The gradient of ``b`` is
    ``-g (a / b) / b``. A rounding of ``a`` would count more where ``b`` is smaller.
    """
    def decide(saved: SavedTensor) -> Decision:
        dividend, divisor = (
            saved.call.argument(i, name) for i, name in enumerate(("input", "other")))
        if not saved.aliases(dividend) or saved.aliases(divisor):
            return Decision(None, "divisor: backward is not linear in it")
        return Decision(
            saved.codec, "dividend: the divisor's gradient is linear in it",
            shared=stands_alone(saved),
            reach=_reach(list(tensors_in((divisor,))), saved.tensor.numel()), rows=of_elements,
            units="quotient")

    return OpRule(_floats(decide))


def _others(saved: SavedTensor) -> list[Tensor]:
    """Returns the floating-point arguments beside the saved tensor.

    If the saved tensor is not an argument itself, it counts as a copy of the first argument.
    """
    position = saved.position or 0
    return [
        t for i, a in enumerate(saved.arguments) if i != position
        for t in tensors_in((a,)) if t.is_floating_point()]


def stands_alone(saved: SavedTensor) -> bool:
    """Whether gradients of the other arguments meet no other rounding of the saved tensor.

    See NOTE [ No two roundings of one tensor are multiplied ] in :mod:`brevitas_bp.backward.origins`.
    """
    others = [t for t in _others(saved) if t.grad_fn is not None]
    location = current_location()
    if location is None or not (others or saved.call is NO_CALL):
        return True
    storage = storage_id(saved.tensor)
    if storage not in location.ever_rounded:
        return True
    if saved.call is NO_CALL:
        # We do not know the arguments of a custom Function.
        return False
    custom = storage in location.rounded_unseen
    return not any(goes_through_rounding_of(storage, t, custom) for t in others)


def _reach(factors: list[Tensor], size: int) -> Literal["weight", "sum", "all"]:
    """Returns the reach of a tensor of ``size`` elements that is multiplied by ``factors``.

    If a factor is a parameter, nothing else is reached. A small factor's gradient sums many roundings.
    """
    if any(is_parameter(t) for t in factors):
        return "weight"
    return "sum" if any(t.numel() * _AVERAGED <= size for t in factors) else "all"


def normalization(statistics: bool = False) -> OpRule:
    """Makes a rule for a norm over the last dimension: only its input is quantized.

    Mean and inverse deviation are exact. The gradient of the scale is unbiased. The gradient of the
    input has a relative bias of order 1/M with M elements to a statistic, because the normalized input
    enters this gradient twice.

    Args:
        statistics: whether the last two tensors that the operation saves are mean and inverse deviation.
            If so, the input is stored normalized, ``(x - mean) * rstd``. Backward uses the normalized
            input, so a rounding of it counts the same in every row or channel.
    """
    def decide(saved: SavedTensor) -> Decision:
        if saved.is_norm_statistic:
            return Decision(None, "statistic of a norm")
        x = saved.tensor
        of_channels = statistics and x.dim() > 1 and (
            "batch" in saved.call.name or "instance" in saved.call.name)
        least = norm_bits(x.numel() // max(x.shape[1], 1)) if of_channels else 1
        if least is None:
            return FEW_IN_STATISTIC
        alone = stands_alone(saved)
        return Decision(
            saved.codec, "input of a norm: bias of order 1/M", shared=alone,
            reach="norm" if alone else "all", rows=last_dimension,
            units="statistic" if statistics and _is_first(saved) else None, least_bits=least)

    return OpRule(_floats(decide))


def _is_first(saved: SavedTensor) -> bool:
    """Whether a saved tensor is the first argument, or a copy that can be of no other argument."""
    position = saved.position
    return position == 0 or (position is None and not any(
        t.numel() == saved.tensor.numel() for t in tensors_in(saved.arguments[1:])))


def norm_bits(elements: int) -> int | None:
    """Returns the least bits for the input of a norm; None means that the input stays exact.

    Here ``elements`` elements share one statistic. A rounding reaches the gradient of the input with a
    weight of order 1 / sqrt(elements). So four times fewer elements need one more bit; such tensors are
    small. With very few elements, the norm removes most of the gradient. The rest is far smaller than
    the numbers that are rounded.

    >>> [norm_bits(elements) for elements in (1000, 256, 64, 16, 4)]
    [1, 1, 3, 4, None]
    """
    if elements < _FEW:
        return None
    return 1 if elements >= _ENOUGH else 2 + math.ceil(math.log(_ENOUGH / elements, 4))


#: The decision for the input of a norm with few elements to a statistic.
FEW_IN_STATISTIC = Decision(None, "too few elements share a statistic to round them")


def lossless(
        choose: Callable[[SavedTensor], Codec | None], reason: str,
        rewrite: Rewrite | None = None) -> OpRule:
    """Makes a rule for a codec that gives backward all it needs: the gradient stays exact."""
    def decide(saved: SavedTensor) -> Decision:
        codec = choose(saved)
        return Decision(codec, "kept exact" if codec is None else reason)

    return OpRule(decide, rewrite)


def elementwise(
        formula: Callable[..., Tensor] | None = None, *,
        few_bit: Callable[[Call], dict[str, Any] | None] | None = None, **options: Any) -> OpRule:
    """Makes a rule for a smooth elementwise function: backward is linear in the saved derivative.

    Args:
        formula: ``(x, y, call) -> dy/dx``; None lets autograd compute it, which is slower. The formulas
            of torch's activations are in :data:`~brevitas_bp.activations.functions.ACTIVATIONS`.
        few_bit: see :class:`OpRule`.
        **options: arguments of :class:`~brevitas_bp.backward.rewrites.SaveDerivative`.
    """
    def decide(saved: SavedTensor) -> Decision:
        return _FEW_ELEMENTS if saved.tensor.numel() < SMALLEST else _NOT_REWRITTEN

    return OpRule(decide, SaveDerivative(formula, **options), few_bit)


_FEW_ELEMENTS = Decision(None, "few elements: a derivative would not be smaller")
_NOT_REWRITTEN = Decision(None, "not linear in what is saved, and not rewritten here")


def composite() -> OpRule:
    """Makes a rule for a Python function of torch whose inner functions follow their own rules."""
    return OpRule(
        exact("saved by a composite function itself").decide, look_through)


def _floats(decide: Decide) -> Decide:
    other = Decision(None, "not a floating-point tensor")
    return lambda saved: decide(saved) if saved.tensor.dtype in FLOATS else other


_by_name: dict[str, OpRule] = {}
# Entries of functions and classes vanish when nobody else holds the object, for instance when a notebook
# cell runs again. Methods of torch support no weak references, so their entries stay.
_by_object: WeakKeyDictionary[Any, OpRule] = WeakKeyDictionary()
_by_method: dict[Any, OpRule] = {}
# Cache: function of torch -> its rule, if any. It is read for every function that runs.
_found: dict[Any, OpRule | None] = {}


def register_op(operation: str | Callable[..., Any], rule: OpRule) -> None:
    """Tells the op-aware policy how to store the saved tensors of an operation.

    Args:
        operation: one of

            * a function that ``TorchFunctionMode`` sees: any function of torch, or one of your own that
              calls ``torch.overrides.handle_torch_function``;
            * the name of a function of torch, in all its forms ("mul" is ``torch.mul``, ``Tensor.mul``,
              ``Tensor.mul_``, ``*`` and ``*=``);
            * a module class, for tensors that custom autograd Functions save while the module runs.
        rule: made by :func:`linear`, :func:`weighted`, :func:`product`, :func:`normalization`,
            :func:`elementwise`, :func:`lossless`, :func:`composite` or :func:`exact`.

    Raises:
        TypeError: ``rule`` is not an :class:`OpRule`, or ``operation`` is neither name nor callable.

    Example:
        >>> register_op("dist", exact("a distance"))
    """
    where = "brevitas_bp.backward.register_op"
    if not isinstance(rule, OpRule):
        raise TypeError(
            f"{where}: rule must be an OpRule, got {rule!r}; call one of the functions in "
            "brevitas_bp.backward.operations, for instance linear()")
    if isinstance(operation, str):
        _by_name[operation.strip("_")] = rule
    elif callable(operation):
        try:
            table = _by_method if isinstance(operation, MethodType) else _by_object
            table[operation] = rule
        except TypeError:
            _by_method[operation] = rule
    else:
        raise TypeError(
            f"{where}: operation must be a function, a name or a module class, got {operation!r}")
    _found.clear()


def rule_of(operation: Any) -> OpRule | None:
    """Returns the rule of a function or module class, or None."""
    try:
        return _found[operation]
    except KeyError:
        rule = _find(operation)
        if not isinstance(operation, type) and _is_of_torch(operation):
            _found[operation] = rule
        return rule
    except TypeError:
        return None


def _find(operation: Any) -> OpRule | None:
    try:
        known = _by_object.get(operation)
    except TypeError:
        known = None
    known = _by_method.get(operation) if known is None else known
    if known is not None:
        return known
    if isinstance(operation, type):
        return next((_by_object[base] for base in operation.__mro__ if base in _by_object), None)
    name = getattr(operation, "__name__", None)
    return _by_name.get(name.strip("_")) if name and _is_of_torch(operation) else None


# In the ``__module__`` of an operator, the operator's namespace follows this prefix.
_REGISTERED = "torch._ops."


def _is_of_torch(function: Any) -> bool:
    """Whether a function is torch's own: another function of that name may save something else."""
    # Methods of Tensor have no module.
    module = getattr(function, "__module__", None) or getattr(
        getattr(function, "__objclass__", None), "__module__", None) or "torch"
    if module.startswith(_REGISTERED):
        # Anybody may register an operator, under any name, with its own backward.
        return module.removeprefix(_REGISTERED) == "aten"
    return module.partition(".")[0] == "torch"
