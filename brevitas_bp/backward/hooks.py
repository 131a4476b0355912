"""The pack and unpack hooks of one forward pass."""

import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from brevitas_bp.backward.checkpointing import is_checkpoint_input
from brevitas_bp.backward.compiled.dynamo import in_python
from brevitas_bp.backward.compiled.hooks import CompiledSite, GraphHooks, hooks_for_inputs
from brevitas_bp.backward.explain import Explanation
from brevitas_bp.backward.location import Location, Rewrites, current_location, enter, leave
from brevitas_bp.backward.parameters import ParameterSet
from brevitas_bp.backward.policy import (
    PlainPolicy,
    Policy,
    can_encode,
    explained,
)
from brevitas_bp.backward.rewrites import Substitution
from brevitas_bp.backward.saved import (
    CHECKPOINT_INPUT,
    FEW_BIT_INPUT,
    NO_CALL,
    Call,
    Decision,
    SavedTensor,
    name_of,
    storage_id,
    tensors_in,
    without_class,
)
from brevitas_bp.backward.units import (
    Deferred,
    NormUnits,
    PendingNorm,
    channel_units,
    units_of,
)
from brevitas_bp.codec.base import (
    PLAIN,
    Codec,
    Keep,
    Packed,
    is_plain,
    is_smaller,
    refuse_modified,
    version_of,
)
from brevitas_bp.codec.derivatives import derivative_at
from brevitas_bp.codec.layout import TensorLayout, shape_of
from brevitas_bp.codec.normalized import NormalizedCodec, QuotientCodec
from brevitas_bp.codec.on_backward import QuantizeOnBackward
from brevitas_bp.codec.rows import ReorderedCodec, in_rows
from brevitas_bp.codec.shape_only import zeros
from brevitas_bp.codec.shard import ShardCodec, placements_of, shard_of
from brevitas_bp.errors import CorruptPayloadError
from brevitas_bp.private import (
    in_forward_ad,
    is_functorch_wrapped,
    pop_hooks,
    push_hooks,
    top_hooks,
)

_KEEP = Keep()

# Elements below which it is asked before encoding whether that can be worth it.
_SMALL = 1024
_NOT_PLAIN = Decision(None, "not an ordinary tensor")
# Elements from which a tensor that is kept as it is may spare others an encoding.
_WORTH_NOTING = 64
_TRANSFORM = (
    "brevitas_bp: {} takes derivatives with torch.func (grad, vjp, jacrev, hessian) in its forward, "
    "which PyTorch refuses where saved tensors have hooks; wrap the modules beside it one by one, and "
    "leave it and what contains it unwrapped")
_KEPT_ALREADY = "another operation keeps it exact"
_STATISTIC = Decision(None, "statistic of a norm")
_CENTRED = Decision(None, "the input is stored as its deviation from the mean")


class Listener(Protocol):
    """Is told of every saved tensor."""

    def __call__(
            self, saved: SavedTensor, packed: Packed, decision: Decision,
            originals: Sequence[Tensor]) -> None:
        """Called when a tensor was packed.

        Args:
            saved: the tensor, and where.
            packed: what is stored.
            decision: what the policy said, or :data:`PARAMETER`.
            originals: what plain autograd would have saved.
        """
        ...


#: Is told what a compiled graph keeps: the site, where known, and the live tensors.
GraphListener = Callable[[CompiledSite | None, list[Tensor]], None]

#: The decision for parameters and buffers: no policy is asked.
PARAMETER = Decision(None, "parameter or buffer")


@final
class Kept:
    """A kept tensor where nobody listens: as :class:`Packed` of the codec :class:`Keep`, made faster.

    Most of what a network saves are parameters and statistics.

    Args:
        x: the tensor.
        function: what saves it, or the name of that; None outside of torch functions.
        module: qualified name of the module that runs.
    """

    __slots__ = ("__weakref__", "function", "module", "tensor", "version")

    def __init__(self, x: Tensor, function: Any, module: str) -> None:
        self.tensor = kept = x.detach()
        self.version = version_of(kept)
        self.function = function
        self.module = module

    def decode(self) -> Tensor:
        """The tensor itself.

        Raises:
            ModifiedInPlaceError: it was modified by an in-place operation since.
        """
        if version_of(self.tensor) != self.version:
            op = None if self.function is None else name_of(self.function)
            refuse_modified(self.tensor, self.version, _where(op, self.module))
        return self.tensor


class ForwardPass:
    """One forward pass: decides for each saved tensor, and encodes it once.

    NOTE [ One encode per storage and version ]
    1. A tensor saved by several operations is encoded once: the key is its storage, offset, shape,
       strides, dtype, version, lazy conjugation or negation, and the codec; and the call, where the
       policy says that the rounding must not be shared.
    2. The storage is held by a weak reference. It keeps the address from being reused, not the memory.
    3. The payload is held weakly too: it lives exactly as long as the graph nodes that need it.
    4. The table lives as long as the forward pass.

    Args:
        root: the module that runs.
        codec_of: module name -> configured codec, or None for exact.
        policy: saved tensor -> codec, or None for exact.
        next_seed: seed of the next encode.
        on_backward: keep floats and quantize when backward asks.
        listeners: told of every saved tensor.
        explanation: told what was decided for every saved tensor.
        verify: seal what is packed with a checksum.
        graph_hooks: returns the hooks for compiled modules, which replace those of the pass and call
            them; asked only if there are compiled modules.
        compiled: whether the root is compiled by what calls it.
    """

    def __init__(
            self,
            root: nn.Module,
            codec_of: Callable[[str], Codec | None],
            policy: Policy,
            next_seed: Callable[[], int],
            on_backward: bool = False,
            listeners: tuple[Listener, ...] = (),
            explanation: Explanation | None = None,
            verify: bool = False,
            graph_hooks: Callable[[Location], GraphHooks | None] | None = None,
            compiled: bool = False) -> None:
        outer = current_location()
        self.location = Location(
            root, "" if outer is None else outer.qualified_module, compiled)
        self.parameters = ParameterSet(root, self.location.tree)
        self.codec_of = codec_of
        self.policy = explained(policy)
        if not isinstance(self.policy, PlainPolicy):
            self.location.rewrites = Rewrites(self._rewrite_of)
        self.location.observer = getattr(self.policy, "observe", None)
        self.location.next_seed = self.next_seed = next_seed
        self.on_backward = on_backward
        self.listeners = listeners
        self.explanation = explanation
        self.verify = verify
        self.hooks: tuple[Callable[[Any], Any], Callable[[Any], Any]] = (self.pack, unpack)
        self.graph_hooks = None
        if graph_hooks is not None and self.location.compiled:
            self.graph_hooks = graph_hooks(self.location)
        if self.location.compiled:
            self.pack_in_python = in_python(self.pack)
            self.hooks = self.pack_in_python, in_python(unpack)
        if self.graph_hooks is not None:
            self.location.forward_pass = self
            self.hooks = self.graph_hooks.pack, self.graph_hooks.unpack
            if explanation is not None:
                self.location.graphs, explanation.prefix = explanation.graphs, self.location.prefix
        self._hooked = self._closed = False
        # Of what was encoded on the CPU.
        self.given_bytes = 0
        self._resources = ExitStack()
        self._encoded: dict[Any, tuple[StorageWeakRef, weakref.ref[Packed]]] = {}
        self._slots: defaultdict[Any, itertools.count[int]] = defaultdict(itertools.count)
        # Numbers of what custom Functions do not share.
        self._apart = itertools.count(-2, -1)
        self._substitution: Substitution | None = None
        self._exact: dict[int, tuple[StorageWeakRef, weakref.ref[Kept | Packed], int | None]] = {}
        self._norm: PendingNorm | None = None

    def pack(self, x: Tensor) -> Packed | Kept | Deferred:
        """Pack hook."""
        original = x
        if type(x) not in PLAIN:
            x = without_class(x)
        location, substitution = self.location, self._substitution
        if type(x) is nn.Parameter and substitution is None and not self.listeners:
            return Kept(x, location.call.function, location.qualified_module)
        role = None if substitution is None else next(substitution.roles, None)
        call = location.call
        if call is NO_CALL and is_checkpoint_input():
            role = CHECKPOINT_INPUT
        derivative = None if substitution is None else substitution.derivative
        # What a derivative follows from is not what is saved, be it a parameter.
        stands_in = derivative is not None or role == FEW_BIT_INPUT
        if not stands_in and self.parameters.contains(x, call.arguments):
            if not self.listeners:
                return Kept(x, call.function, location.qualified_module)
            saved, decision = self._saved(x, None, None), PARAMETER
            packed = self._encode_once(saved, decision) if can_encode(x) else _kept(saved)
        else:
            saved = self._saved(x, self.codec_of(location.module), role)
            saved.derivative = derivative
            if original is not x:
                saved.original = original
            decision = self.policy.decide(saved) if can_encode(x) else _NOT_PLAIN
            if decision.codec is not None and decision.rows is not None and self._is_kept(saved):
                decision = decision._replace(codec=None, reason=_KEPT_ALREADY)
            if decision.units == "statistic" and decision.codec is not None and is_plain(x) and (
                    self._may_begin_norm(call)):
                return self._begin_norm(saved, decision)
            if self._norm is not None and self._norm.saved.call is call and (
                    x.is_floating_point() and (decision.codec is None or saved.position is None)):
                # What a norm computes are statistics, be they as many as the elements of its input.
                decision = decision if decision.codec is None else _STATISTIC
                deferred = Deferred()
                self._norm.statistics.append((saved, decision, deferred))
                return deferred
            if decision.codec is None and not self.listeners:
                return self._keep(saved, decision)
            packed = _kept(saved) if decision is _NOT_PLAIN else self._encode_once(saved, decision)
            if decision.codec is None:
                self._note_exact(saved, packed)
            if substitution is not None:
                # Where elements share memory, writing to one would write to all.
                substitution.anew = packed.codec.decodes_anew and (
                    packed.layout.base_shape == packed.layout.shape)
        self._tell(saved, packed, decision, self._originals(x) if self.listeners else ())
        return packed

    def _note_rounded(self, saved: SavedTensor) -> None:
        """See NOTE [ No two roundings of one tensor are multiplied ]."""
        location, storage = self.location, storage_id(saved.tensor)
        location.ever_rounded.add(storage)
        if saved.call is NO_CALL:
            location.rounded_unseen.add(storage)
            return
        if location.rounding is not saved.call:
            location.rounding, location.rounded = saved.call, set()
        location.rounded.add(storage)

    def _keep(self, saved: SavedTensor, decision: Decision) -> Kept:
        """Keeps a tensor where nobody listens."""
        if self.explanation is not None:
            self.explanation.add_kept(saved, decision)
        kept = Kept(_exact(saved), saved.call.function or saved.op, saved.module)
        self._note_exact(saved, kept)
        return kept

    def _tell(
            self, saved: SavedTensor, packed: Packed, decision: Decision,
            originals: Sequence[Tensor]) -> None:
        if self.explanation is not None and decision is not PARAMETER:
            self.explanation.add(saved, packed, decision)
        for listener in self.listeners:
            listener(saved, packed, decision, originals)

    def _note_exact(self, saved: SavedTensor, kept: Kept | Packed) -> None:
        """Notes a storage that the graph keeps alive as it is, all of it; see :meth:`_is_kept`."""
        x = saved.tensor
        if saved.derivative is None and is_plain(x) and x.numel() >= _WORTH_NOTING and (
                isinstance(kept, Kept) or kept.codec.keeps):
            storage = x.untyped_storage()
            if storage.nbytes() <= x.numel() * x.element_size():
                self._exact[storage._cdata] = (
                    StorageWeakRef(storage), weakref.ref(kept), version_of(x))

    def _is_kept(self, saved: SavedTensor) -> bool:
        """Whether another operation keeps the storage of the tensor as it is.

        A reference to it costs nothing, where an encoding would take bytes and add noise.
        """
        x = saved.tensor
        if saved.derivative is not None or not self._exact or not is_plain(x):
            return False
        found = self._exact.get(x.untyped_storage()._cdata)
        return found is not None and found[1]() is not None and found[2] == version_of(x)

    def _may_begin_norm(self, call: Call) -> bool:
        """Whether what the call saves last are mean and inverse deviation of what it saves now.

        Forward mode saves more, some of it without memory; in transforms of ``torch.func`` what is
        computed after the operation may have none.
        """
        begun = self._norm is not None and self._norm.saved.call is call
        return not begun and not in_forward_ad() and not any(
            is_functorch_wrapped(t) for t in tensors_in(call.arguments))

    def _begin_norm(self, saved: SavedTensor, decision: Decision) -> Deferred:
        """See NOTE [ Inputs of norms are stored normalized ]."""
        deferred = Deferred()
        originals = self._originals(saved.tensor) if self.listeners else ()
        self._norm = PendingNorm(saved, decision, deferred, originals)
        if saved.call is NO_CALL:
            # A custom Function says nothing of its end.
            self._end_norm()
        else:
            self.location.ending = self._end_norm
        return deferred

    def _end_norm(self) -> None:
        """Stores the input of the norm that has ended, and what else it has saved."""
        pending, self._norm = self._norm, None
        assert pending is not None
        saved, decision = pending.saved, pending.decision
        units = units_of(pending)
        packed = self._encode_once(saved, decision, units)
        pending.deferred.packed = packed
        self._tell(saved, packed, decision, pending.originals)
        dropped = None
        if units is not None and units.drops_mean and not packed.codec.keeps:
            dropped = pending.statistics[-2][0]
        for statistic, why, deferred in pending.statistics:
            if statistic is dropped:
                stored = zeros().encode(statistic.tensor)
                self._tell(statistic, stored, _CENTRED, (statistic.tensor,) if self.listeners else ())
            elif self.listeners:
                stored = _kept(statistic)
                self._tell(statistic, stored, why, (statistic.tensor,))
            else:
                stored = self._keep(statistic, why)
            deferred.packed = stored

    def graphs(
            self, output: Any, inputs: Any) -> Iterator[tuple[CompiledSite | None, list[Tensor]]]:
        """Tensors that compiled graphs of this pass keep, but for parameters; where known with site."""
        if self.graph_hooks is not None:
            for site, tensors in self.graph_hooks.live(output, inputs):
                if tensors and not (
                        site is None and self.parameters.contains(tensors[0], ())):
                    yield None if site is None else site.under(self.location.prefix), tensors

    @contextmanager
    def saving(self, *roles: str) -> Iterator[Substitution]:
        """Within the block, the tensors that are saved have these roles, in order."""
        before = self._substitution
        self._substitution = Substitution(roles, recorded=bool(self.listeners))
        try:
            yield self._substitution
        finally:
            self._substitution = before

    def _rewrite_of(self, function: Any) -> Callable[[Call], Any] | None:
        """How a function is run so that it saves something else, where the policy says so."""
        rewrite = self.policy.rewrite(function)
        if rewrite is None:
            return None

        def run(call: Call) -> Any:
            if self.codec_of(self.location.module) is None or not self._is_innermost():
                return NotImplemented
            return rewrite(self, call)

        return run

    def _is_innermost(self) -> bool:
        """Whether what is saved now comes to this pass, not to hooks that others set inside of it.

        Checkpointing sets hooks that drop what is saved, and counts whether the second run saves the
        same: there the operations must be themselves.
        """
        top: Any = top_hooks(True)
        return top is not None and top[0] == self.hooks[0]

    def _saved(self, x: Tensor, codec: Codec | None, role: str | None) -> SavedTensor:
        location = self.location
        op = "checkpoint" if role is CHECKPOINT_INPUT else location.op
        return SavedTensor(
            x, op, location.qualified_module, codec, location.call, location.module_type,
            role, location.module, location.compiled and location.call is NO_CALL)

    def _originals(self, x: Tensor) -> Sequence[Tensor]:
        """What plain autograd would have saved; told with the first of the tensors saved instead."""
        if self._substitution is None:
            return (x,)
        originals, self._substitution.originals = self._substitution.originals, []
        return originals

    def _encode_once(
            self, saved: SavedTensor, decision: Decision, units: NormUnits | None = None) -> Packed:
        x = saved.tensor
        codec = _KEEP if decision.codec is None else decision.codec
        # Each derivative is rounded on its own.
        if codec.lossy and saved.derivative is None:
            self._note_rounded(saved)
        in_units: Callable[[Codec], Codec] | None = None
        if units is not None:
            in_units = partial(_normalized, units)
        elif decision.codec is not None and decision.units == "quotient" and (
                divisor := _divisor_of(saved)) is not None:
            in_units = partial(QuotientCodec, divisor)
        elif decision.codec is not None and decision.units == "channel" and is_plain(x):
            in_units = partial(_in_channels, x)
        if units is None and decision.codec is not None and decision.rows is not None and (
                rows := decision.rows(shard_of(x), saved.call)) is not None:
            codec = in_rows(codec, rows)
        # Each derivative is one of its own, whatever it is computed from.
        shared = decision.shared and saved.derivative is None
        # Norms of one kind with equal settings have equal statistics of one tensor.
        norm = None if units is None else _settings(saved.call)
        number = -1 if shared else saved.call.number if saved.call is not NO_CALL else next(self._apart)
        key = *_identity(x), id(codec), number, norm
        before = self._encoded.get(key)
        if before is not None:
            packed = before[1]()
            if packed is not None:
                return packed
        packed = self._encode(saved, codec, in_units)
        self._encoded[key] = (
            StorageWeakRef(shard_of(x).untyped_storage()), weakref.ref(packed))
        return packed

    def _encode(
            self, saved: SavedTensor, codec: Codec,
            in_units: Callable[[Codec], Codec] | None = None) -> Packed:
        where = _where(saved.op, saved.module)
        if codec.per_site:
            codec = codec.at_site((where, next(self._slots[codec, where])))
        if in_units is not None:
            codec = in_units(codec)
        if codec.keeps:
            return _kept(saved)
        x = saved.tensor
        shard = shard_of(x)
        if shard is not x:
            codec = ShardCodec(codec)
        if not codec.compresses:
            packed = codec.encode(_stored(saved), seed=0, where=where)
            return packed.sealed() if self.verify else packed
        # Codes, padding and metadata must be smaller than what they replace. What is in other units and
        # is encoded later has to be known now: its mean is kept, or not.
        if shard.numel() < _SMALL or (self.on_backward and codec.wraps):
            layout = TensorLayout.of(shard)
            least = codec.stored_nbytes(layout)
            if least is not None and not is_smaller(least, layout.nbytes):
                return _kept(saved)
        if self.on_backward:
            codec = QuantizeOnBackward(codec)
        if saved.derivative is None:
            packed = codec.encode(x, seed=self.next_seed(), where=where)
        else:
            packed = codec.encode_derivative(
                x, saved.derivative, seed=self.next_seed(), where=where)
        if self.on_backward:
            return packed
        if self.verify:
            packed = packed.sealed()
        if not packed.is_smaller:
            return _kept(saved)
        if packed.layout.device.type == "cpu":
            self.given_bytes += packed.layout.nbytes
        return packed

    def __enter__(self) -> "ForwardPass":
        try:
            enter(self.location)
            if self.graph_hooks is not None:
                self._resources.enter_context(hooks_for_inputs())
            self._hooked = True
            push_hooks(*self.hooks)
        except RuntimeError as error:
            self._hooked = False
            self.close()
            raise RuntimeError(
                "QuantBackwardWrapper.forward: saved-tensor hooks are disabled here (torch.func "
                "transforms such as grad and vjp do that); run the wrapped module itself, "
                f"wrapper.module, inside the transform. PyTorch says: {error}") from error
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.close()
        # In the words of PyTorch.
        if isinstance(error, RuntimeError) and "support saved tensor hooks" in str(error):
            raise RuntimeError(_TRANSFORM.format(self._running_at(traceback))) from error

    def _running_at(self, traceback: Any) -> str:
        """The innermost module of the pass in a traceback."""
        found = "the network"
        while traceback is not None:
            module = traceback.tb_frame.f_locals.get("self")
            if isinstance(module, nn.Module) and self.location.names.get(id(module)):
                found = f"{self.location.names[id(module)]!r} ({type(module).__name__})"
            traceback = traceback.tb_next
        return found

    def close(self) -> None:
        """Leaves nothing installed; to be called again, in ``finally``, after the ``with`` block.

        See NOTE [ Interrupts ].
        """
        if not self._closed:
            if self._hooked:
                _remove_hooks(self.hooks[0])
            leave(self.location)
            self._resources.close()
            self._closed = True
            # They hold the pass, which would wait for the garbage collector, and with it the modules.
            self.hooks = unpack, unpack


def _remove_hooks(pack: Callable[[Tensor], Any]) -> None:
    """Takes the hooks of a pass, and all above them, from the stack of this thread."""
    others = []
    while (top := top_hooks(True)) is not None:
        pop_hooks()
        if top[0] == pack:
            return
        others.append(top)
    for pair in reversed(others):
        push_hooks(*pair)


def _identity(x: Tensor) -> tuple[Hashable, ...]:
    """Equal for tensors with equal values, as long as their storage lives.

    A change in place of a DTensor counts in its own version, not in that of its shard.
    """
    shard = x if type(x) is Tensor else shard_of(x)
    of_shard = (storage_id(shard), shard.storage_offset(), shard.shape, shard.stride(), x.dtype,
                version_of(shard), shard.is_conj(), shard.is_neg())
    if shard is x:
        return of_shard
    return *of_shard, type(x), version_of(x), x.shape, placements_of(x)


def _settings(call: Call) -> Hashable:
    """A function and all its arguments but tensors, in their order."""
    others = [a for a in call.arguments if not (a is None or isinstance(a, Tensor))]
    return call.name, *(a if isinstance(a, float) else str(a) for a in others)


def _kept(saved: SavedTensor) -> Packed:
    """Of what has no elements, or no memory to know it by."""
    return _KEEP.encode(_exact(saved), where=_where(saved.op, saved.module))


def _stored(saved: SavedTensor) -> Tensor:
    """What is to be stored: the tensor, or a derivative at it."""
    if saved.derivative is None:
        return saved.tensor
    return derivative_at(saved.tensor, saved.derivative)


def _exact(saved: SavedTensor) -> Tensor:
    """What is kept as it is: with its class, which a custom Function may ask for."""
    return _stored(saved) if saved.original is None else saved.original


def _where(op: str | None, module: str) -> str:
    return f"{op or 'a custom function'} in {module or 'the wrapped module'}"


def _normalized(units: NormUnits, codec: Codec) -> Codec:
    """The codec of a norm's input."""
    rows = units.rows
    if rows is not None:
        codec = in_rows(codec, rows._replace(order=None))
    codec = NormalizedCodec(codec, units.affine, units.undo)
    return codec if rows is None or rows.order is None else ReorderedCodec(codec, rows.order)


def _in_channels(x: Tensor, codec: Codec) -> Codec:
    """The codec of an input whose channels meet gradients of their own."""
    units = channel_units(x)
    return codec if units is None else _normalized(units, codec)


def _divisor_of(saved: SavedTensor) -> Callable[[], Tensor] | None:
    """The divisor of a quotient that has the shape of its dividend, kept exact; None: there is none."""
    divisor = saved.call.argument(1, "other")
    x = saved.tensor
    if not (isinstance(divisor, Tensor) and is_plain(divisor) and is_plain(x)):
        return None
    if not divisor.is_floating_point() or TensorLayout.base(x).shape != x.shape or (
            torch.broadcast_shapes(divisor.shape, x.shape) != x.shape):
        return None
    return Kept(divisor, saved.call.function, saved.module).decode


def unpack(given: Packed | Kept | Deferred) -> Tensor:
    """Unpack hook. Holds nothing of the forward pass.

    Raises:
        CorruptPayloadError: the codec gave back another kind of tensor. Autograd would not complain: a
            wrong shape is broadcast.
    """
    packed: Packed | Kept = given.packed if isinstance(given, Deferred) else given
    x = packed.decode()
    if isinstance(packed, Kept):
        return x
    layout = packed.layout
    if shape_of(x) != layout.shape or x.dtype != layout.dtype or x.device != layout.device:
        got, expected = (
            (t.dtype, tuple(shape), t.device)
            for t, shape in ((x, shape_of(x)), (layout, layout.shape)))
        raise CorruptPayloadError(
            f"brevitas_bp: the codec {packed.codec.name!r} decoded {got}, but {expected} was saved by "
            f"{packed.where or 'an operation'}; its decode must undo its encode")
    return x
