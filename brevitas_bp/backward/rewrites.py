"""Operations that run as always but save something else, so that rounding keeps the gradient unbiased.

NOTE [ Rewritten operations ]
1. The forward is computed by the very function that was called: same bits, same random numbers.
2. What is saved instead enters backward linearly: the derivative of an elementwise function, the value
   of attention. Stochastic rounding of it leaves the expected gradient as it is.
3. What is saved instead is a number, no longer a function of the input: with ``create_graph=True`` the
   second derivative would lack a term, so backward raises :class:`SecondDerivativeError`.
4. Rewriting happens only where our own hooks would store the tensor: not without gradients, not for
   tensors of other classes, and not inside ``torch.utils.checkpoint``, which counts what is saved.
5. Nothing that outlives the call holds a tensor, but through ``save_for_backward``.
"""

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
from brevitas_bp.backward.location import Location, seen_through
from brevitas_bp.backward.rows import RowsOf, of_elements
from brevitas_bp.backward.saved import (
    DERIVATIVE,
    FEW_BIT_INPUT,
    Call,
    storage_id,
    tensors_in,
    without_class,
)
from brevitas_bp.codec.base import Packed
from brevitas_bp.codec.derivatives import derivative_at
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.shard import is_dtensor, is_partial, is_storable, on_shards
from brevitas_bp.errors import SecondDerivativeError
from brevitas_bp.private import in_forward_ad, is_functorch_wrapped, is_legacy_batched

# Elements below which a derivative is not worth its overhead.
SMALLEST = 256


class RunningPass(Protocol):
    """What a rewrite may ask of the forward pass."""

    location: Location

    def saving(self, *roles: str) -> AbstractContextManager["Substitution"]:
        """Within the block, the tensors that are saved have these roles, in order."""
        ...


class Substitution:
    """What a rewritten call and the forward pass tell each other while the call saves its tensors.

    The call says which roles they have, which derivative is to be stored, and for the report what plain
    autograd would save. The pass says how it has stored them, see :meth:`stored_as`.

    Args:
        roles: of the tensors, in the order in which they are saved.
        recorded: whether a report wants the originals.

    Attributes:
        derivative: name of the function whose derivative at the saved tensor is to be stored; None: the
            tensor itself.
        writable: whether backward gets the tensor that was saved last in new memory, where it may write.
    """

    __slots__ = ("derivative", "originals", "recorded", "roles", "writable")

    def __init__(self, roles: tuple[str, ...], recorded: bool) -> None:
        self.roles = iter(roles)
        self.recorded = recorded
        self.derivative: str | None = None
        self.writable = False
        self.originals: list[Tensor] = []

    def stored_as(self, packed: Packed) -> None:
        """The pass has stored a tensor of the call."""
        # Where elements share memory, writing to one would write to all.
        self.writable = packed.codec.decodes_anew and (
            packed.layout.base_shape == packed.layout.shape)

    def note(self, saved: Tensor) -> Tensor:
        """Pack hook that notes an original; detached, or an output that saves itself never goes."""
        self.originals.append(saved.detach())
        return saved.detach()

    def replace(self, stand_in: Tensor, original: Tensor) -> None:
        """Takes ``original`` for what was noted in the memory of its stand-in."""
        self.originals = [
            original if storage_id(t) == storage_id(stand_in) else t for t in self.originals]


#: (pass, call) -> output, or NotImplemented to run the function as it is.
Rewrite = Callable[[RunningPass, Call], Any]


def look_through(running: RunningPass, call: Call) -> Any:
    """Runs a composite function of torch so that each function inside is treated by its own rule.

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
    """Rewrites an elementwise function of its first argument: its derivative is saved.

    Args:
        formula: ``(x, y, call) -> dy/dx``, shaped like ``x``; None lets autograd compute it, for any
            function.
        of_output: ``formula`` reads only ``y``.
        halves: ``call -> dim`` where the function halves a dimension and ``dy/dx`` holds both halves.
        named: call -> the derivative's name in :mod:`~brevitas_bp.activations.derivatives`, which serves
            the tensors that it supports, in place of ``formula``.
        rows: rows of the derivative with which buckets end; None: it is of order 1 at most, whatever the
            input, so that any elements may share a bucket.
        inplace_at: position of ``inplace`` among the arguments of a function in ``torch.nn.functional``.
    """

    formula: Callable[[Tensor, Tensor, Call], Tensor] | None = None
    of_output: bool = False
    halves: Callable[[Call], int] | None = None
    named: Callable[[Call], str] | None = None
    rows: RowsOf | None = of_elements
    inplace_at: int | None = None

    #: Of what is saved.
    role: ClassVar[str] = DERIVATIVE

    def __call__(self, running: RunningPass, call: Call) -> Any:
        x = call.argument(0, "input")
        if "out" in call.kwargs or not (
                isinstance(x, Tensor) and x.requires_grad and is_storable(without_class(x))
                and x.is_floating_point() and torch.is_grad_enabled()):
            return NotImplemented
        if is_dtensor(x) and (self.halves is not None or is_partial(x)):
            return NotImplemented
        # Small or expanded, the derivative would take more than what it stands for.
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
        """Output and derivative, or what it follows from.

        Autograd runs where it must, or where a report asks.
        """
        if substitution.recorded or self._needs_autograd:
            return self._by_autograd(x, call, inplace, substitution)
        before = x.clone() if inplace and self._reads_input else x
        y = call.function(*call.args, **call.kwargs)
        return y, self._saved_for(before, y, call, substitution)

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
            if self._needs_autograd:
                (derivative,) = torch.autograd.grad(result, leaf, torch.ones_like(result))
            else:
                derivative = self._derivative(leaf.detach(), y, call)
        return x.copy_(y) if inplace else y, derivative

    def _derivative(self, x: Tensor, y: Tensor, call: Call) -> Tensor:
        # In float32 where they are shorter: the derivative is rounded once, by the codec.
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
    """Whether another tensor of its shape has place for it: vmap shows one where there are several."""
    return type(grad) is Tensor and not is_compiling() and not (
        is_functorch_wrapped(grad) or is_legacy_batched(grad))


def is_inplace(call: Call, position: int | None) -> bool:
    """Whether an activation function was told to overwrite its input, by any value that counts as true.

    Args:
        call: of the function.
        position: of the argument ``inplace`` where the function is one of ``torch.nn.functional``.
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
            f"brevitas_bp: backward of {name} was asked for with create_graph=True, but what was saved "
            "for it gives first derivatives only; wrap with policy='exact', or give the modules that "
            "are differentiated twice an override of None")
