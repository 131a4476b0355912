"""Losses of logits that are computed again in backward, so that nothing of their size is stored.

NOTE [ Logits are computed again ]
1. A linear layer whose output is much wider than its input is noted when it runs: its input, weight and
   bias, and the storage of its output. Copies and casts of the output are noted too. Views need no
   note: they are in the same storage.
2. A loss whose logits lie in a noted storage, unchanged since, saves the layer's input exactly, and
   weight and bias by reference. Backward runs layer, copies and loss again, and differentiates the loss
   by the logits. The layer's own backward then runs as always: it sees the gradient of its output.
   So no parameter has a second path in the graph.
3. The gradient of the logits is exact. It has the bits of plain autograd if the layer gives the same
   bits twice, as on a CPU.
4. Weights that change in between raise an error, as in plain autograd. Sharded parameters are freed
   after the layer has run, and gathered again only for its backward: there, losses run as always.
5. Notes hold the inputs of layers until the pass ends, or the logits are freed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from brevitas_bp.backward.attention import cast_by_autocast
from brevitas_bp.backward.registry import rule_of
from brevitas_bp.backward.rewrites import (
    Rewrite,
    RunningPass,
    Substitution,
    refuse_second_derivative,
)
from brevitas_bp.backward.saved import (
    RECOMPUTED,
    Call,
    Decision,
    is_ordinary,
    name_of,
    storage_id,
    tensors_in,
)
from brevitas_bp.codec.base import FLOATS
from brevitas_bp.codec.keep import version_of
from brevitas_bp.private import in_forward_ad

_LOSSES = frozenset({"cross_entropy", "log_softmax"})
#: The decision for the input of the layer.
KEPT = Decision(None, "logits are computed again from it")
# Functions that may copy a tensor, or cast it.
_COPIES = frozenset({
    "to", "float", "double", "half", "bfloat16", "type", "contiguous", "clone", "reshape", "view",
    "flatten"})


@dataclass(frozen=True)
class _View:
    """The place of a tensor in its storage."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, x: Tensor) -> "_View":
        return cls(x.shape, x.stride(), int(x.storage_offset()))

    def __call__(self, base: Tensor) -> Tensor:
        return base.as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True, eq=False)
class Made:
    """How the tensor that fills a storage was made from the inputs of a linear layer.

    Attributes:
        storage: the storage.
        version: version of the tensor when it was made.
        view: its place in the storage; all of its elements lie there.
        dtype: its dtype.
        given: input, weight and bias of the linear layer.
        versions: their versions.
        again: input, weight and bias -> the tensor.
    """

    storage: StorageWeakRef
    version: int | None
    view: _View
    dtype: torch.dtype
    given: tuple[Tensor, Tensor, Tensor | None]
    versions: tuple[int | None, ...]
    again: Callable[..., Tensor]


def rewrite_of(function: Any, bits: int) -> Rewrite | None:
    """Returns how to run a function if logits are to be computed again; None: as always.

    Args:
        function: a function that the pass sees.
        bits: bits of a stored probability. A layer is noted if its input is smaller than that.
    """
    if rule_of(function) is None:
        return None
    name = name_of(function).strip("_")
    if name == "linear":
        return lambda running, call: _note_linear(running, call, bits)
    if name in _COPIES:
        return _note_copy
    return (lambda running, call: _recompute(running, call, bits)) if name in _LOSSES else None


def _note_linear(running: RunningPass, call: Call, bits: int) -> Any:
    """Runs a linear layer, and notes it if its output would take more bytes than its input."""
    x, weight, bias = (
        call.argument(i, name) for i, name in enumerate(("input", "weight", "bias")))
    given = [t for t in (x, weight, bias) if t is not None]
    if not all(isinstance(t, Tensor) and is_ordinary(t) for t in given) or weight.dim() != 2 or (
            not torch.is_grad_enabled() or in_forward_ad() or running.parameters.gathered):
        return NotImplemented
    kept = cast_by_autocast(x)
    if weight.shape[0] * bits <= weight.shape[1] * kept.element_size() * 8:
        return NotImplemented
    output = call.function(*call.args, **call.kwargs)
    autocast, function = _Autocast(x.device.type), call.function

    def again(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with autocast():
            return function(x, weight, bias)

    _note(running, output, (kept, weight, bias), again)
    return output


def _note_copy(running: RunningPass, call: Call) -> Any:
    """Runs a function of one tensor, and notes its output if it copies or casts a noted tensor."""
    x = call.args[0] if call.args else None
    made = made_in(running, x) if isinstance(x, Tensor) else None
    if made is None or any(True for _ in tensors_in(call.arguments[1:])):
        return NotImplemented
    assert isinstance(x, Tensor)
    output = call.function(*call.args, **call.kwargs)
    if isinstance(output, Tensor) and storage_id(output) != storage_id(x):
        function, rest, options = call.function, call.args[1:], call.kwargs
        view, before = _View.of(x), made.again
        _note(running, output, made.given, lambda *given: function(
            view(before(*given)), *rest, **options))
    return output


def _note(
        running: RunningPass, output: Tensor, given: tuple[Tensor, Tensor, Tensor | None],
        again: Callable[..., Tensor]) -> None:
    if not is_ordinary(output) or output.dtype not in FLOATS or output.storage_offset():
        return
    noted = running.location.made
    for key in [key for key, made in noted.items() if made.storage.expired()]:
        del noted[key]
    noted[storage_id(output)] = Made(
        StorageWeakRef(output.untyped_storage()), version_of(output), _View.of(output), output.dtype,
        given, _versions(given), again)


def _versions(given: tuple[Tensor | None, ...]) -> tuple[int | None, ...]:
    return tuple(None if t is None else version_of(t) for t in given)


def made_in(running: RunningPass, x: Tensor) -> Made | None:
    """Returns how the storage of a tensor was filled; None if that is not known, or it has changed."""
    made = running.location.made.get(storage_id(x)) if running.location.made else None
    if made is None or made.version is None or version_of(x) != made.version or x.dtype != made.dtype:
        return None
    same = is_ordinary(x) and not x.is_neg() and _versions(made.given) == made.versions
    return made if same else None


def _recompute(running: RunningPass, call: Call, bits: int) -> Any:
    """Runs a loss so that it saves the input of the layer that made its logits, if that is smaller."""
    logits = call.argument(0, "input")
    others = list(tensors_in(v for v in call.arguments if v is not logits))
    if not (isinstance(logits, Tensor) and logits.requires_grad and torch.is_grad_enabled()
            and not in_forward_ad()) or any(t.requires_grad or not is_ordinary(t) for t in others):
        return NotImplemented
    made = made_in(running, logits)
    if made is None or 8 * made.given[0].nbytes >= bits * logits.numel():
        # The loss may be that of a few of the rows.
        return NotImplemented
    # Other tensors, such as targets, have no role: the rule of the loss decides about them.
    with running.saving(*[RECOMPUTED] * sum(t is not None for t in made.given)) as substitution:
        return _Recomputed.apply(logits, _Loss(call, logits, made), substitution, *made.given, *others)


class _Autocast:
    """The autocast settings of a device type, now."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.dtype = torch.get_autocast_dtype(device)
        self.enabled = torch.is_autocast_enabled(device)

    def __call__(self) -> AbstractContextManager[Any]:
        # A cast in backward has no gradient, so no forward pass may find it in the cache.
        return torch.autocast(
            self.device, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


class _Loss:
    """Runs a loss, and runs it again later from recomputed logits. It holds no tensor.

    Args:
        call: call of the loss.
        logits: the logits.
        made: how their storage was filled.
    """

    def __init__(self, call: Call, logits: Tensor, made: Made) -> None:
        self.function = call.function
        self.again, self.made, self.view = made.again, made.view, _View.of(logits)
        self.autocast = _Autocast(logits.device.type)
        self.args, self.kwargs = (
            tuple(_place(a, logits) for a in call.args),
            {key: _place(a, logits) for key, a in call.kwargs.items()})

    def run(self, logits: Tensor, others: tuple[Tensor, ...]) -> Tensor:
        """Returns the loss; ``others`` are the other tensors among its arguments, in order."""
        rest = iter(others)
        args = [self._filled(a, logits, rest) for a in self.args]
        return self.function(
            *args, **{key: self._filled(a, logits, rest) for key, a in self.kwargs.items()})

    @staticmethod
    def _filled(argument: Any, logits: Tensor, rest: Any) -> Any:
        return logits if argument is _LOGITS else next(rest) if argument is _OTHER else argument

    def logits(self, given: tuple[Tensor | None, ...]) -> Tensor:
        """Computes the logits again."""
        base = self.again(*given)
        assert base.shape == self.made.shape and base.stride() == self.made.stride
        return self.view(base)


# Stand for tensors among the arguments of a loss.
_LOGITS, _OTHER = object(), object()


def _place(argument: Any, logits: Tensor) -> Any:
    return _LOGITS if argument is logits else _OTHER if isinstance(argument, Tensor) else argument


class _Recomputed(torch.autograd.Function):

    @staticmethod
    def forward(
            ctx: Any, logits: Tensor, loss: _Loss, substitution: Substitution,
            *tensors: Tensor | None) -> Tensor:
        ctx.loss = loss
        ctx.save_for_backward(*tensors)
        others: Any = tensors[3:]
        if not substitution.recorded:
            return loss.run(logits, others)
        leaf = logits.detach().requires_grad_()
        with torch.enable_grad(), saved_tensors_hooks(substitution.note, lambda saved: saved):
            output = loss.run(leaf, others).detach()
        substitution.replace(leaf, logits)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse_second_derivative(name_of(ctx.loss.function))
        saved = ctx.saved_tensors
        _check_memory(saved[:3])
        leaf = ctx.loss.logits(saved[:3]).detach().requires_grad_()
        with torch.enable_grad(), ctx.loss.autocast():
            output = ctx.loss.run(leaf, saved[3:])
        (gradient,) = torch.autograd.grad(output, leaf, grads[0])
        return gradient, *[None] * (2 + len(saved))


def _check_memory(given: tuple[Tensor | None, ...]) -> None:
    for t in given:
        if t is not None and t.numel() and t.untyped_storage().nbytes() == 0:
            raise RuntimeError(
                "brevitas_bp.backward.OpAware: recompute_logits needs the weight of the layer that "
                "makes the logits, but its memory was freed after the forward pass, as sharded "
                "parameters are; leave recompute_logits out")
