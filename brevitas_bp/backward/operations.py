"""Rules that say how the saved tensors of an operation are stored.

Users may add rules (:func:`~brevitas_bp.backward.registry.register_op`). Stochastic rounding leaves a
gradient unbiased if backward is linear in the rounded tensor, and if no two roundings of one tensor are
multiplied. Each rule says which saved tensors of its operation meet both conditions. All others are
exact, except inputs of norms (:func:`normalization`).
"""

import math
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from brevitas_bp.backward.elementary import divides_by, relative_to_itself
from brevitas_bp.backward.location import current_location
from brevitas_bp.backward.origins import first_rounding_of, goes_through_rounding_of
from brevitas_bp.backward.parameters import is_function_of_parameter, is_view_or_cast_of
from brevitas_bp.backward.registry import Decide, OpRule
from brevitas_bp.backward.rewrites import SMALLEST, Rewrite, SaveDerivative, look_through
from brevitas_bp.backward.rows import (
    INPUT_BITS,
    RowsOf,
    convolved,
    is_small_input,
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
    is_ordinary,
    own_shape,
    storage_id,
    tensors_in,
)
from brevitas_bp.backward.views import IN_ORDER_NODES, comes_from
from brevitas_bp.backward.written_norms import averages_rows, is_statistic_of
from brevitas_bp.codec.base import FLOATS, Codec
from brevitas_bp.private import in_forward_ad

# A factor that is broadcast to at least this many times its size is kept. It has few bytes, and each of
# its roundings would reach many gradients.
_BROADCAST = 16

# Elements to a statistic of a norm. From _ENOUGH on, the input needs no more bits than configured; below
# _FEW, it stays exact.
_ENOUGH, _FEW = 256, 16

# If one gradient sums at least this many roundings, they need no more bits than configured.
_AVERAGED = 256

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
        saved.copied = _copied_input(saved)
        apart = shares_planes(saved.tensor, saved.call) if rows is convolved else False
        alone = stands_alone(saved)
        factor = list(tensors_in(saved.arguments[weight:weight + 1]))
        return Decision(
            saved.codec, "input: the gradient of the weight is linear in it", rows=rows,
            units="channel" if apart else None, shared=alone,
            reach="weight" if alone else _reach(factor, saved.tensor.numel()),
            least_bits=INPUT_BITS if is_small_input(saved.tensor, saved.call) else 1)

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


def _copied_input(saved: SavedTensor) -> Tensor | None:
    """Returns the input of a layer, if the saved tensor is a copy of it: cast, or made contiguous."""
    x, given = saved.tensor, saved.call.argument(0, "input")
    if saved.position is not None or not isinstance(given, Tensor) or given.numel() != x.numel():
        return None
    alike = given.shape == x.shape or (
        saved.call.name == "linear" and given.shape[-1:] == x.shape[-1:])
    # A tangent of forward mode, and what a user's function computes, may have the shape of the input.
    return given if alike and is_ordinary(given) and not in_forward_ad() and (
        comes_from(x, given, IN_ORDER_NODES)) else None


def product(
        summands: int = 0, rows: RowsOf = of_matrix, of_itself: bool = False) -> OpRule:
    """Makes a rule for a product of two tensors, elementwise or of matrices.

    The gradient of each factor is linear in the other factor. A factor shares its rounding unless the
    gradient of the other factor meets a rounding of it again. A widely broadcast factor is exact.

    Args:
        summands: number of arguments before the factors, to which the product is added.
        rows: finds the elements of a factor that backward multiplies by the same gradients.
        of_itself: whether both factors are one tensor.
    """
    def decide(saved: SavedTensor) -> Decision:
        tensors = list(tensors_in(saved.arguments[summands:]))
        size = saved.tensor.numel()
        if any(size * _BROADCAST <= a.numel() for a in tensors):
            return Decision(None, "broadcast factor: few bytes, many gradients")
        if len(tensors) == 2 and any(is_statistic_of(saved.tensor, t) for t in tensors):
            return _WRITTEN_NORM._replace(codec=saved.codec, rows=rows)
        reach = _reach(tensors, size)
        alone = reach == "weight" or stands_alone(saved, of_itself)
        if not alone and any(divides_by(saved.tensor, t) for t in _others(saved)):
            return relative_to_itself(saved, "factor of a gradient that is divided by it")
        return Decision(
            saved.codec, "factor: the other's gradient is linear in it", shared=alone, reach=reach,
            rows=rows)

    return OpRule(_floats(decide))


def square() -> OpRule:
    """Makes a rule for the square of a tensor: backward is linear in it.

    See NOTE [ Norms that are written out ] in :mod:`brevitas_bp.backward.written_norms`.
    """
    of_product = product(rows=of_elements, of_itself=True).decide

    def decide(saved: SavedTensor) -> Decision:
        if saved.following is None:
            return of_product(saved)._replace(waits=True)
        if averages_rows(saved.following, saved.tensor):
            return _WRITTEN_NORM._replace(codec=saved.codec, rows=of_elements)
        return of_product(saved)

    return OpRule(_floats(decide))


_WRITTEN_NORM = Decision(None, "input of a norm that is written out: bias of order 1/M", reach="norm")


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
        if isinstance(divisor, Tensor) and is_statistic_of(saved.tensor, divisor):
            return _WRITTEN_NORM._replace(codec=saved.codec, rows=of_elements)
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


def stands_alone(saved: SavedTensor, of_itself: bool = False) -> bool:
    """Whether gradients of the other arguments meet no other rounding of the saved tensor.

    See NOTE [ No two roundings of one tensor are multiplied ] in :mod:`brevitas_bp.backward.origins`.

    Args:
        saved: the tensor.
        of_itself: whether the gradient of the first argument has the saved tensor as a factor, as in a
            square. The operation that computed this argument may have rounded it, as ``exp`` does.
    """
    first = saved.call.argument(0, "input") if of_itself else None
    others = [t for t in (*_others(saved), *tensors_in((first,))) if t.grad_fn is not None]
    location = current_location()
    if location is None:
        # The pass has ended, and does not tell any more what is rounded.
        return not of_itself
    if not (others or saved.call is NO_CALL):
        return True
    storage = storage_id(saved.tensor if saved.copied is None else saved.copied)
    storages = location.shared_roundings.of(storage)
    if location.ever_rounded.isdisjoint(storages):
        return True
    if saved.call is NO_CALL:
        # We do not know the arguments of a custom Function.
        return False
    custom = not location.rounded_unseen.isdisjoint(storages)
    arguments = list(tensors_in(saved.call.arguments[saved.position or 0:]))
    alone = not custom and len(storages) == 1
    first = first_rounding_of(storage, arguments[0]) if alone and arguments else 0
    return not any(
        goes_through_rounding_of(s, t, custom, first) for t in others for s in storages)


def _reach(factors: list[Tensor], size: int) -> Literal["weight", "sum", "all"]:
    """Returns the reach of a tensor of ``size`` elements that is multiplied by ``factors``.

    If a factor is a function of a parameter, nothing else is reached. A small factor sums many
    roundings into its gradient.
    """
    if any(is_function_of_parameter(t) for t in factors):
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
        rewrite: Rewrite | None = None, zeros_outside: bool = False) -> OpRule:
    """Makes a rule for a codec that gives backward all it needs: the gradient stays exact.

    Args:
        choose: saved tensor -> codec, or None to keep the tensor.
        reason: the reason that a report shows.
        rewrite: see :class:`OpRule`.
        zeros_outside: the codec stores a mask, outside of which the saved tensor is zero.
    """
    def decide(saved: SavedTensor) -> Decision:
        codec = choose(saved)
        return Decision(
            codec, "kept exact" if codec is None else reason, zeros_outside=zeros_outside)

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
