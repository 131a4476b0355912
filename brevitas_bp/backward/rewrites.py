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

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_compiling
from torch.nn.attention import SDPBackend, sdpa_kernel

from brevitas_bp.activations import derivatives
from brevitas_bp.backward.location import Location, seen_through
from brevitas_bp.backward.rows import RowsOf, of_elements
from brevitas_bp.backward.saved import (
    ATTENTION_INPUT,
    ATTENTION_VALUE,
    DERIVATIVE,
    FEW_BIT_INPUT,
    REPLAYED,
    Call,
    storage_id,
    tensors_in,
    without_class,
)
from brevitas_bp.codec.base import Packed, is_plain
from brevitas_bp.codec.derivatives import derivative_at
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.shard import is_dtensor, is_partial, is_storable, on_shards
from brevitas_bp.errors import SecondDerivativeError
from brevitas_bp.private import in_forward_ad, is_functorch_wrapped, is_legacy_batched

# Below this many elements, a derivative is not worth its overhead.
SMALLEST = 256
_ATTENTION_TENSORS = ("query", "key", "value", "attn_mask")


class RunningPass(Protocol):
    """The part of the forward pass that a rewrite may use."""

    location: Location

    def saving(self, *roles: str) -> AbstractContextManager["Substitution"]:
        """Gives these roles, in order, to the tensors that are saved within the block."""
        ...


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
        writable: whether backward gets the last saved tensor in new memory, to which it may write.
    """

    __slots__ = ("derivative", "originals", "recorded", "roles", "writable")

    def __init__(self, roles: tuple[str, ...], recorded: bool) -> None:
        self.roles = iter(roles)
        self.recorded = recorded
        self.derivative: str | None = None
        self.writable = False
        self.originals: list[Tensor] = []

    def stored_as(self, packed: Packed) -> None:
        """Notes how the pass has stored a tensor of the call."""
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
        from_input: whether the codec takes the input, and decodes it to a derivative.
        named: call -> the derivative's name in :mod:`~brevitas_bp.activations.derivatives`. For tensors
            that this module supports, it replaces ``formula``.
        rows: rows of the derivative with which buckets end. None: the derivative is of order 1 at most,
            whatever the input, so any elements may share a bucket.
        inplace_at: position of ``inplace`` among the arguments of a function in ``torch.nn.functional``.
    """

    formula: Callable[[Tensor, Tensor, Call], Tensor] | None = None
    of_output: bool = False
    halves: Callable[[Call], int] | None = None
    from_input: bool = False
    named: Callable[[Call], str] | None = None
    rows: RowsOf | None = of_elements
    inplace_at: int | None = None

    def __call__(self, running: RunningPass, call: Call) -> Any:
        x = call.argument(0, "input")
        if "out" in call.kwargs or not (
                isinstance(x, Tensor) and x.requires_grad and is_storable(without_class(x))
                and x.is_floating_point() and torch.is_grad_enabled()):
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
        role = FEW_BIT_INPUT if self.from_input else DERIVATIVE
        with running.saving(role) as substitution:
            return _SaveDerivative.apply(x, call, self, inplace, substitution)

    def differentiate(
            self, x: Tensor, call: Call, inplace: bool,
            substitution: Substitution) -> tuple[Tensor, Tensor]:
        """Returns the output and the derivative, or the tensor from which the derivative follows.

        Autograd runs only if it must, or if a report asks.
        """
        if (self.formula is not None or self.from_input) and not substitution.recorded:
            before = x.clone() if inplace and (self.from_input or not self.of_output) else x
            y = call.function(*call.args, **call.kwargs)
            source = y if self.of_output else before
            if self.named is not None and type(source) is Tensor and derivatives.supports(source) and (
                    not self.from_input):
                substitution.derivative = self.named(call)
                return y, source.detach()
            return y, self._derivative(before, y, call)
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
            if self.formula is None and not self.from_input:
                (derivative,) = torch.autograd.grad(result, leaf, torch.ones_like(result))
            else:
                derivative = self._derivative(leaf.detach(), y, call)
        return x.copy_(y) if inplace else y, derivative

    def _derivative(self, x: Tensor, y: Tensor, call: Call) -> Tensor:
        if self.from_input:
            return x.detach()
        # Shorter dtypes are computed in float32, so that only the codec rounds the derivative.
        dtype = torch.promote_types(y.dtype, torch.float32)
        return on_shards(lambda x, y: self._at(x.to(dtype), y.to(dtype), call), x, y)

    def _at(self, x: Tensor, y: Tensor, call: Call) -> Tensor:
        assert self.formula is not None
        source = y if self.of_output else x
        if self.named is not None and derivatives.supports(source):
            return derivative_at(source, self.named(call))
        return self.formula(x, y, call)


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
        _refuse_second_derivative(ctx.function)
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


@dataclass(frozen=True)
class ReplayAttention:
    """Rewrites scaled dot-product attention: backward runs it again, from query, key and value.

    For given attention weights, the gradient is linear in the value. The weights follow from query and
    key. So query and key are kept as they are, and the value is quantized. The output, its log-sum-exp
    and the weights are not kept. Random numbers, autocast and the choice of kernels are those of the
    forward pass.
    """

    def __call__(self, running: RunningPass, call: Call) -> Any:
        given = [call.argument(i, name) for i, name in enumerate(_ATTENTION_TENSORS)]
        tensors = [t for t in given if t is not None]
        if not torch.is_grad_enabled() or in_forward_ad() or not (
                all(is_plain(without_class(t)) for t in tensors)
                and any(t.requires_grad for t in tensors)):
            return NotImplemented
        given = [None if t is None else _autocast(t) for t in given]
        roles = [ATTENTION_INPUT, ATTENTION_INPUT, ATTENTION_VALUE, REPLAYED][:len(tensors)]
        with running.saving(*roles, REPLAYED) as substitution:
            return _ReplayAttention.apply(_Replay(call), substitution, *given)


def _autocast(x: Tensor) -> Tensor:
    """Casts ``x`` as autocast will anyway, so that the cast is kept, not the longer original."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


class _Replay:
    """Runs attention, and runs it again later under the same circumstances."""

    def __init__(self, call: Call) -> None:
        self.function = call.function
        self.rest = call.args[len(_ATTENTION_TENSORS):]
        self.options = {k: v for k, v in call.kwargs.items() if k not in _ATTENTION_TENSORS}
        self.device: str = call.argument(0, "query").device.type
        self.autocast = torch.get_autocast_dtype(self.device), torch.is_autocast_enabled(self.device)
        self.backends = _attention_backends()

    def run(self, given: Sequence[Tensor | None]) -> Tensor:
        return self.function(*given, *self.rest, **self.options)

    def generator_state(self) -> Tensor | None:
        """Returns the state of the generator that dropout draws from; None without dropout."""
        dropout = self.rest[0] if self.rest else self.options.get("dropout_p", 0.0)
        return _generator(self.device).get_rng_state() if dropout > 0 else None

    def again(self, given: Sequence[Tensor | None], generator_state: Tensor | None) -> Tensor:
        dtype, enabled = self.autocast
        with torch.autocast(self.device, dtype=dtype, enabled=enabled), _only(
                self.backends), _drawing_from(_generator(self.device), generator_state):
            return self.run(given)


class _ReplayAttention(torch.autograd.Function):

    @staticmethod
    def forward(
            ctx: Any, replay: _Replay, substitution: Substitution,
            *given: Tensor | None) -> Tensor:
        ctx.replay = replay
        ctx.save_for_backward(*given, replay.generator_state())
        if not substitution.recorded:
            return replay.run(given)
        with torch.enable_grad(), saved_tensors_hooks(substitution.note, lambda saved: saved):
            return replay.run(_leaves(given, ctx.needs_input_grad[2:])).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _refuse_second_derivative("scaled_dot_product_attention")
        *saved, generator_state = ctx.saved_tensors
        given = _leaves(saved, ctx.needs_input_grad[2:])
        with torch.enable_grad():
            output = ctx.replay.again(given, generator_state)
        wanted = [t for t in given if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, grads[0]))
        return None, None, *(
            next(found) if t is not None and t.requires_grad else None for t in given)


def _leaves(given: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    return [
        None if t is None else t.detach().requires_grad_(need) for t, need in zip(given, needed)]


def _refuse_second_derivative(name: str) -> None:
    if torch.is_grad_enabled():
        raise SecondDerivativeError(
            f"brevitas_bp: backward of {name} was called with create_graph=True, but the tensors saved "
            "for it give first derivatives only; wrap with policy='exact', or give the modules that "
            "are differentiated twice an override of None")


def _attention_backends() -> list[SDPBackend]:
    """Returns the kernels that attention may choose from now."""
    cuda = torch.backends.cuda
    enabled = {
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: cuda.math_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled()}
    return [backend for backend, on in enabled.items() if on]


def _only(backends: list[SDPBackend]) -> AbstractContextManager[Any]:
    return nullcontext() if backends == _attention_backends() else sdpa_kernel(backends)


def _generator(device: str) -> Any:
    return torch if device == "cpu" else torch.get_device_module(device)


@contextmanager
def _drawing_from(generator: Any, state: Tensor | None) -> Iterator[None]:
    """Draws from ``state`` within the block, and restores the generator afterwards."""
    if state is None:
        yield
        return
    before = generator.get_rng_state()
    try:
        generator.set_rng_state(state)
        yield
    finally:
        generator.set_rng_state(before)
