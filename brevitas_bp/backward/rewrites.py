"""Runs operations as always, but saves something else, so that rounding keeps the gradient unbiased.

NOTE [ Rewritten operations ]
1. The function that was called computes the forward: same bits, same random numbers.
2. The tensor saved instead enters backward linearly: the derivative of an elementwise function, or the
   value of attention. Stochastic rounding of this tensor leaves the expected gradient as it is.
3. The tensor saved instead holds numbers, and is no longer a function of the input. With
   ``create_graph=True``, the second derivative would lack a term. So backward raises
   :class:`SecondDerivativeError`.
4. A call is rewritten only where our own hooks would store the tensor. It is not rewritten without
   gradients, for tensors of other classes, or inside ``torch.utils.checkpoint``, which counts saved
   tensors.
5. Nothing that outlives the call holds a tensor, except through ``save_for_backward``.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_compiling

from brevitas_bp.activations import derivatives
from brevitas_bp.backward.computable import FindComputed, width_of
from brevitas_bp.backward.identity import Place
from brevitas_bp.backward.location import Location, seen_through
from brevitas_bp.backward.parameters import ParameterSet
from brevitas_bp.backward.rows import RowsOf, of_elements
from brevitas_bp.backward.saved import (
    DERIVATIVE,
    FEW_BIT_INPUT,
    Call,
    storage_id,
    tensors_in,
    without_class,
)
from brevitas_bp.codec.base import PLAIN, Packed
from brevitas_bp.codec.derivatives import derivative_at
from brevitas_bp.codec.layout import TensorLayout, is_plain
from brevitas_bp.codec.shard import is_dtensor, is_partial, is_storable, on_shards
from brevitas_bp.errors import SecondDerivativeError
from brevitas_bp.private import in_forward_ad, is_functorch_wrapped, is_legacy_batched

# Below this many elements, a derivative is not worth its overhead.
SMALLEST = 256


class RunningPass(Protocol):
    """The part of the forward pass that a rewrite may use."""

    location: Location
    parameters: ParameterSet

    def saving(self, *roles: str) -> AbstractContextManager["Substitution"]:
        """Gives these roles, in order, to the tensors that are saved within the block."""
        ...

    def note_computed(self, output: Tensor, find: FindComputed) -> None:
        """Notes that backward can compute the output of a call."""
        ...


# NOTE [ What a function saves is learnt once ]
# A report counts what plain autograd would have saved. To find out, the function runs under autograd,
# and its derivative becomes a tensor of its own, which takes time. Activations of torch save the same in
# every call: the input, or the output. So the answer is kept here, for each function, dtype and kind of
# device. In-place calls, calls under autocast (which may save a cast copy), functions that save two
# tensors, and functions of users are asked each time.
_saves: dict[tuple[Any, torch.dtype, str], str] = {}


class Substitution:
    """Carries facts between a rewritten call and the forward pass while the call saves its tensors.

    The call says which roles its tensors have and which derivative is to be stored. For the report, it
    says what plain autograd would save. The pass says how it has stored the tensors, see
    :meth:`stored_as`.

    Args:
        roles: roles of the tensors, in the order in which they are saved.
        recorded: whether a report wants the originals.

    Attributes:
        derivative: name of the function whose derivative at the saved tensor is to be stored; None
            stores the tensor itself.
        name: name of that derivative, also if it is computed before it is stored; None: it has no name.
        output: place of the function's output, of an ordinary tensor; None: it has none.
        writable: whether backward gets the last saved tensor in new memory, to which it may write.
        widths: role -> least bits of the tensors that are stored rounded.
    """

    __slots__ = (
        "derivative", "name", "originals", "output", "recorded", "roles", "widths", "writable")

    def __init__(self, roles: tuple[str, ...], recorded: bool) -> None:
        self.roles = iter(roles)
        self.recorded = recorded
        self.derivative: str | None = None
        self.name: str | None = None
        self.output: Place | None = None
        self.writable = False
        self.widths: dict[str | None, float] = {}
        self.originals: list[Tensor] = []

    def stored_as(self, packed: Packed, role: str | None) -> None:
        """Notes how the pass has stored a tensor of the call."""
        self.widths[role] = min(self.widths.get(role, math.inf), width_of(packed))
        # If elements share memory, writing to one would write to all.
        self.writable = packed.codec.decodes_anew and (
            packed.layout.base_shape == packed.layout.shape)

    def note(self, saved: Tensor) -> Tensor:
        """Pack hook that notes an original.

        The original is detached, because an output that saves itself would never be freed.
        """
        self.originals.append(saved.detach())
        return saved.detach()

    def replace(self, stand_in: Tensor, original: Tensor) -> None:
        """Replaces each noted tensor in the memory of ``stand_in`` by ``original``."""
        self.originals = [
            original if storage_id(t) == storage_id(stand_in) else t for t in self.originals]


#: (pass, call) -> output, or NotImplemented to run the function as it is.
Rewrite = Callable[[RunningPass, Call], Any]


def look_through(running: RunningPass, call: Call) -> Any:
    """Runs a composite function of torch so that each function inside follows its own rule.

    Raises:
        ValueError: the function is not written in Python.
    """
    if not isinstance(call.function, FunctionType):
        raise ValueError(
            f"brevitas_bp: {call.name} was registered as composite(), but it is not a Python function "
            "that could be looked through; register it with another rule")
    return seen_through(call, running.location)


@dataclass(frozen=True)
class SaveDerivative:
    """Rewrites an elementwise function of its first argument, so that it saves its derivative.

    Args:
        formula: ``(x, y, call) -> dy/dx``, shaped like ``x``; None lets autograd compute it, for any
            function.
        of_output: whether ``formula`` reads only ``y``.
        halves: ``call -> dim`` if the function halves a dimension and ``dy/dx`` holds both halves.
        named: call -> the derivative's name in :mod:`~brevitas_bp.activations.derivatives`. For tensors
            that this module supports, it replaces ``formula``.
        rows: rows of the derivative with which buckets end. None: the derivative is of order 1 at most,
            whatever the input, so any elements may share a bucket.
        inplace_at: position of ``inplace`` among the arguments of a function in ``torch.nn.functional``.
        most_arguments: number of arguments of torch's own operator that ``formula`` takes into account.
            A call with more arguments runs as it is. None: any number.
    """

    formula: Callable[[Tensor, Tensor, Call], Tensor] | None = None
    of_output: bool = False
    halves: Callable[[Call], int] | None = None
    named: Callable[[Call], str] | None = None
    rows: RowsOf | None = of_elements
    inplace_at: int | None = None
    most_arguments: int | None = None

    #: Of what is saved.
    role: ClassVar[str] = DERIVATIVE

    def __call__(self, running: RunningPass, call: Call) -> Any:
        x = call.argument(0, "input")
        if "out" in call.kwargs or not (
                isinstance(x, Tensor) and x.requires_grad and is_storable(without_class(x))
                and x.is_floating_point() and torch.is_grad_enabled()):
            return NotImplemented
        if self.most_arguments is not None and not isinstance(call.function, FunctionType) and (
                len(call.arguments) > self.most_arguments):
            return NotImplemented
        if is_dtensor(x) and (self.halves is not None or is_partial(x)):
            return NotImplemented
        # If ``x`` is small or expanded, its derivative would take more than the tensor it replaces.
        if x.numel() < SMALLEST or TensorLayout.base(x).numel() < x.numel() or in_forward_ad():
            return NotImplemented
        inplace, others = is_inplace(call, self.inplace_at), call.args[1:]
        if call.kwargs:
            others = *others, *[v for k, v in call.kwargs.items() if k != "input"]
        if any(t.requires_grad for t in tensors_in(others)) or (
                inplace and (x.is_leaf or x._is_view())):
            return NotImplemented
        with running.saving(self.role) as substitution:
            return _SaveDerivative.apply(x, call, self, inplace, substitution)

    def differentiate(
            self, x: Tensor, call: Call, inplace: bool,
            substitution: Substitution) -> tuple[Tensor, Tensor]:
        """Returns the output and the derivative, or the tensor from which the derivative follows.

        Autograd runs only if it must, or if a report asks what the function saves, and nobody knows yet.
        """
        saved = self._known_saved(x, call, inplace) if substitution.recorded else None
        if self._needs_autograd or (substitution.recorded and saved is None):
            return self._by_autograd(x, call, inplace, substitution)
        before = x.clone() if inplace and self._reads_input else x
        y = call.function(*call.args, **call.kwargs)
        if saved is not None:
            substitution.originals = [(x if saved == "input" else y).detach()]
        return y, self._saved_for(before, y, call, substitution)

    def _known_saved(self, x: Tensor, call: Call, inplace: bool) -> str | None:
        """Returns which tensor plain autograd saves: "input" or "output"; None if that is not known.

        See NOTE [ What a function saves is learnt once ].
        """
        if inplace or self.named is None or type(x) not in PLAIN or (
                torch.is_autocast_enabled(x.device.type)):
            return None
        return _saves.get((call.function, x.dtype, x.device.type))

    @property
    def _needs_autograd(self) -> bool:
        return self.formula is None

    @property
    def _reads_input(self) -> bool:
        return not self.of_output

    def _saved_for(self, x: Tensor, y: Tensor, call: Call, substitution: Substitution) -> Tensor:
        """The derivative; or its input, where a codec computes it while it encodes."""
        source = y if self.of_output else x
        if self.named is not None and type(source) is Tensor and derivatives.supports(source):
            substitution.derivative = self.named(call)
            return source.detach()
        return self._derivative(x, y, call)

    def _by_autograd(
            self, x: Tensor, call: Call, inplace: bool,
            substitution: Substitution) -> tuple[Tensor, Tensor]:
        """The same, where autograd differentiates, or says what it would have saved."""
        with torch.enable_grad(), saved_tensors_hooks(substitution.note, lambda saved: saved):
            leaf = (x.clone() if inplace else x.detach()).requires_grad_()
            # An in-place function may not write to a leaf.
            first = leaf.clone() if inplace else leaf
            args, kwargs = (first, *call.args[1:]), call.kwargs
            if not call.args:
                args, kwargs = (), {**call.kwargs, "input": first}
            result = call.function(*args, **kwargs)
            y = result.detach()
            if inplace:
                substitution.replace(result, x)
            elif self.named is not None and len(substitution.originals) == 1 and (
                    not torch.is_autocast_enabled(x.device.type)):
                storage = storage_id(substitution.originals[0])
                if storage in (storage_id(leaf), storage_id(y)):
                    _saves[call.function, x.dtype, x.device.type] = (
                        "input" if storage == storage_id(leaf) else "output")
            if self._needs_autograd:
                (derivative,) = torch.autograd.grad(result, leaf, torch.ones_like(result))
            else:
                derivative = self._derivative(leaf.detach(), y, call)
        return x.copy_(y) if inplace else y, derivative

    def _derivative(self, x: Tensor, y: Tensor, call: Call) -> Tensor:
        # Shorter dtypes are computed in float32, so that only the codec rounds the derivative.
        dtype = torch.promote_types(y.dtype, torch.float32)
        return on_shards(lambda x, y: self._at(x.to(dtype), y.to(dtype), call), x, y)

    def _at(self, x: Tensor, y: Tensor, call: Call) -> Tensor:
        assert self.formula is not None
        source = y if self.of_output else x
        if self.named is not None and derivatives.supports(source):
            return derivative_at(source, self.named(call))
        return self.formula(x, y, call)


class SaveInput(SaveDerivative):
    """Saves the input, and leaves the derivative to a codec that decodes the input to one."""

    role = FEW_BIT_INPUT

    @property
    def _needs_autograd(self) -> bool:
        return False

    @property
    def _reads_input(self) -> bool:
        return True

    def _saved_for(self, x: Tensor, y: Tensor, call: Call, substitution: Substitution) -> Tensor:
        return x.detach()

    def _derivative(self, x: Tensor, y: Tensor, call: Call) -> Tensor:
        return x.detach()


class _SaveDerivative(torch.autograd.Function):

    @staticmethod
    def forward(
            ctx: Any, x: Tensor, call: Call, rule: SaveDerivative, inplace: bool,
            substitution: Substitution) -> Tensor:
        y, derivative = rule.differentiate(x, call, inplace, substitution)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(derivative)
        if rule.named is not None and rule.halves is None and is_plain(without_class(y)):
            substitution.name, substitution.output = rule.named(call), Place.of(y)
        ctx.function, ctx.dim = call.name, None if rule.halves is None else rule.halves(call)
        ctx.substitution = substitution
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse_second_derivative(ctx.function)
        (derivative,), grad = ctx.saved_tensors, grads[0]
        if ctx.dim is not None:
            grad = torch.cat((grad, grad), ctx.dim)
        if ctx.substitution.writable and derivative.dtype is grad.dtype and _is_ordinary(grad):
            return derivative.mul_(grad), None, None, None, None
        return (derivative * grad).to(grad.dtype), None, None, None, None


def _is_ordinary(grad: Tensor) -> bool:
    """Whether a tensor with the shape of ``grad`` can hold it.

    Under vmap it cannot, because ``grad`` shows one tensor where there are several.
    """
    return type(grad) is Tensor and not is_compiling() and not (
        is_functorch_wrapped(grad) or is_legacy_batched(grad))


def is_inplace(call: Call, position: int | None) -> bool:
    """Whether a call makes an activation function overwrite its input; any true ``inplace`` counts.

    Args:
        call: call of the function.
        position: position of the argument ``inplace`` if the function is in ``torch.nn.functional``.
    """
    name = call.name
    if name.endswith("_") and not name.endswith("__"):
        return True
    if position is None or not isinstance(call.function, FunctionType):
        return bool(call.kwargs.get("inplace"))
    return bool(call.argument(position, "inplace"))


def refuse_second_derivative(name: str) -> None:
    """To be called in backward of a rewritten operation.

    Raises:
        SecondDerivativeError: a graph of backward is being made.
    """
    if torch.is_grad_enabled():
        raise SecondDerivativeError(
            f"brevitas_bp: backward of {name} was called with create_graph=True, but the tensors saved "
            "for it give first derivatives only; wrap with policy='exact', or give the modules that "
            "are differentiated twice an override of None")
