"""The pack and unpack hooks of one forward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from brevitas_bp.backward.checkpointing import is_checkpoint_input
from brevitas_bp.backward.compiled.dynamo import in_python
from brevitas_bp.backward.compiled.hooks import CompiledSite, GraphHooks, hooks_for_inputs
from brevitas_bp.backward.computable import FindComputed
from brevitas_bp.backward.encoding import Encodings, can_encode
from brevitas_bp.backward.explain import Explanation
from brevitas_bp.backward.kept import ExactStorages, Kept, as_it_is, kept, unpack
from brevitas_bp.backward.location import Location, Rewrites, current_location, enter, leave
from brevitas_bp.backward.norms import Norms
from brevitas_bp.backward.parameters import ParameterSet
from brevitas_bp.backward.policy import PlainPolicy, Policy, explained
from brevitas_bp.backward.rewrites import Substitution
from brevitas_bp.backward.saved import (
    CHECKPOINT_INPUT,
    FEW_BIT_INPUT,
    NO_CALL,
    Call,
    Decision,
    SavedTensor,
    without_class,
)
from brevitas_bp.backward.units import Deferred, NormUnits
from brevitas_bp.backward.waiting import Waiting, may_wait
from brevitas_bp.codec.base import PLAIN, Codec, Packed
from brevitas_bp.private import push_hooks, remove_hooks, top_hooks

_NOT_PLAIN = Decision(None, "not an ordinary tensor")
_TRANSFORM = (
    "brevitas_bp: {} takes derivatives with torch.func (grad, vjp, jacrev, hessian) in its forward, "
    "which PyTorch refuses while saved tensors have hooks; leave this module and every module that "
    "contains it unwrapped, and wrap the modules beside it one by one")
_KEPT_ALREADY = "another operation keeps it exact"


class Listener(Protocol):
    """A callable that receives every saved tensor that is no parameter or buffer."""

    def __call__(
            self, saved: SavedTensor, packed: Packed, decision: Decision,
            originals: Sequence[Tensor]) -> None:
        """Called after a tensor was stored or kept.

        Args:
            saved: the tensor, and the place that saves it.
            packed: the stored tensor.
            decision: the policy's decision.
            originals: the tensors that plain autograd would have saved.
        """
        ...


#: A callable that receives what a compiled graph stores: the site, if known, and the live tensors.
GraphListener = Callable[[CompiledSite | None, list[Tensor]], None]


class ForwardPass:
    """One forward pass: asks the policy about each saved tensor, stores it, and calls the listeners.

    NOTE [ The way of a saved tensor ]
    1. A parameter or buffer is kept. No policy is asked.
    2. For any other tensor, the policy decides: a codec, or None.
    3. The input of a norm waits until the norm has ended (:mod:`~brevitas_bp.backward.units`). So do the
       statistics that the norm saves beside it.
    4. If the policy wants to know the next call, the tensor waits until then.
    5. All other tensors are kept or encoded (:mod:`~brevitas_bp.backward.encoding`).
    6. If there are listeners, every saved tensor but those of 1 gets a :class:`Packed`, even if it is
       kept.

    Args:
        root: the module that runs.
        codec_of: module name -> configured codec; None: keep every tensor of the module.
        policy: saved tensor -> decision.
        next_seed: returns the seed of the next encode.
        on_backward: keep floats, and quantize them when backward asks.
        listeners: called for every saved tensor.
        explanation: records the decision for every saved tensor.
        verify: seal each :class:`Packed` with a checksum.
        graph_hooks: returns the hooks for compiled modules. These replace the hooks of the pass, and
            call them. ``graph_hooks`` is called only if there are compiled modules.
        compiled: whether the caller of the root compiles it.
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
        self.location.next_seed = next_seed
        self.encodings = Encodings(next_seed, on_backward, verify)
        self.listeners = listeners
        self.explanation = explanation
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
        self._resources = ExitStack()
        self._substitution: Substitution | None = None
        self._exact = ExactStorages()
        self._waiting = Waiting(self.location)
        self._norms = Norms()

    @property
    def given_bytes(self) -> int:
        """Size before encoding of the tensors that were encoded on the CPU."""
        return self.encodings.given_bytes

    def pack(self, x: Tensor) -> Packed | Kept | Deferred:
        """Pack hook. See NOTE [ The way of a saved tensor ]."""
        original = x
        if type(x) not in PLAIN:
            x = without_class(x)
        location, substitution = self.location, self._substitution
        if type(x) is nn.Parameter and substitution is None:
            # This is a shortcut: most saved tensors are parameters.
            return Kept(x, location.call.function, location.qualified_module)
        role = None if substitution is None else next(substitution.roles, None)
        if location.call is NO_CALL and is_checkpoint_input():
            role = CHECKPOINT_INPUT
        derivative = None if substitution is None else substitution.derivative
        # ``x`` is only the derivative's input here; do not keep it, even if it is a parameter.
        stands_in = derivative is not None or role == FEW_BIT_INPUT
        if not stands_in and self.parameters.contains(x, location.call.arguments):
            return Kept(x, location.call.function, location.qualified_module)
        saved = self._saved(x, self.codec_of(location.module), role)
        saved.derivative = derivative
        if original is not x:
            saved.original = original
        decision = self._decide(saved)
        if decision.waits:
            if may_wait(saved.call):
                return self._wait(saved, decision)
            saved.following = NO_CALL
            decision = self._decide(saved)
        held = self._norms.hold(self, saved, decision, partial(self.originals, x))
        if held is not None:
            return held
        return self.finish(saved, decision, self.originals(x))

    def _decide(self, saved: SavedTensor) -> Decision:
        """Returns the policy's decision, but keeps a tensor if encoding is impossible or useless."""
        if not can_encode(saved.tensor):
            return _NOT_PLAIN
        decision = self.policy.decide(saved)
        if decision.codec is not None and decision.rows is not None and self._exact.hold(saved):
            return decision._replace(codec=None, reason=_KEPT_ALREADY)
        return decision

    def store(
            self, saved: SavedTensor, decision: Decision, units: NormUnits | None = None) -> Packed:
        """Returns the ``Packed`` of a tensor that is encoded, or that is kept while listeners exist."""
        if decision is _NOT_PLAIN:
            packed = kept(saved)
        else:
            # Each derivative has a rounding of its own.
            if decision.codec is not None and decision.codec.lossy and saved.derivative is None:
                self.location.note_rounded(saved.call, saved.tensor)
                if saved.copied is not None:
                    self.location.note_rounded(saved.call, saved.copied)
            packed = self.encodings.encode_once(saved, decision, units)
        if decision.codec is None:
            self._exact.note(saved, packed)
        return packed

    def keep(self, saved: SavedTensor, decision: Decision) -> Kept:
        """Keeps a tensor when there are no listeners."""
        if self.explanation is not None:
            self.explanation.add_kept(saved, decision)
        found = Kept(as_it_is(saved), saved.call.function or saved.op, saved.module)
        self._exact.note(saved, found)
        return found

    def tell(
            self, saved: SavedTensor, packed: Packed, decision: Decision,
            originals: Sequence[Tensor]) -> None:
        """Tells the listeners, and the explanation, how a tensor was stored."""
        if self.explanation is not None:
            self.explanation.add(saved, packed, decision)
        for listener in self.listeners:
            listener(saved, packed, decision, originals)

    def _wait(self, saved: SavedTensor, decision: Decision) -> Deferred:
        """Defers the decision about a tensor until the next call is known."""
        if decision.codec is not None and decision.codec.lossy:
            self.location.note_rounded(saved.call, saved.tensor)
        originals = self.originals(saved.tensor)
        return self._waiting.add(saved, partial(self._decide_again, saved, originals))

    def _decide_again(
            self, saved: SavedTensor, originals: Sequence[Tensor]) -> Packed | Kept | Deferred:
        """Stores a tensor whose following call is known, unless it belongs to a norm."""
        decision = self._decide(saved)
        return self._norms.hold(self, saved, decision, lambda: originals) or (
            self.finish(saved, decision, originals))

    def finish(
            self, saved: SavedTensor, decision: Decision,
            originals: Sequence[Tensor]) -> Packed | Kept:
        """Keeps or encodes a tensor as decided, and tells the listeners."""
        if decision.codec is None and not self.listeners:
            stored = self.keep(saved, decision)
        else:
            stored = self.store(saved, decision)
            if (substitution := self._substitution) is not None:
                substitution.stored_as(stored, saved.role)
                self.encodings.hints.note_derivative(substitution.output, substitution.name, stored)
            self.tell(saved, stored, decision, originals)
        # A tensor that has waited is stored when its call has ended.
        if self._substitution is None and saved.call.is_product and (
                saved.call is self.location.call):
            self.encodings.computable.note_factor(saved, stored, self.location.endings)
        return stored

    def graphs(
            self, output: Any, inputs: Any) -> Iterator[tuple[CompiledSite | None, list[Tensor]]]:
        """Yields the tensors that compiled graphs of this pass store, each with its site if known.

        Parameters are left out.
        """
        if self.graph_hooks is not None:
            for site, tensors in self.graph_hooks.live(output, inputs):
                if tensors and not (
                        site is None and self.parameters.contains(tensors[0], ())):
                    yield None if site is None else site.under(self.location.prefix), tensors

    def renew(self, root: nn.Module) -> None:
        """Forgets the tensors saved so far: a pass that only counts may last for many training steps.

        Parameters and names of modules are collected anew, since the step between may have changed them.
        """
        location = self.location
        assert location.counts_only and location.next_seed is not None
        location.renew(root)
        self.parameters = ParameterSet(root, location.tree)
        self.encodings = Encodings(location.next_seed)
        self._exact = ExactStorages()

    @contextmanager
    def saving(self, *roles: str) -> Iterator[Substitution]:
        """Gives these roles, in order, to the tensors that are saved within the block."""
        before = self._substitution
        self._substitution = Substitution(roles, recorded=bool(self.listeners))
        try:
            yield self._substitution
        finally:
            self._substitution = before

    def note_computed(self, output: Tensor, find: FindComputed) -> None:
        """Notes that backward can compute the output of a call."""
        self.encodings.computable.note(output, find)

    def _rewrite_of(self, function: Any) -> Callable[[Call], Any] | None:
        """Returns a rewrite, which runs ``function`` so that it saves something else, or None."""
        rewrite = self.policy.rewrite(function)
        if rewrite is None:
            return None

        def run(call: Call) -> Any:
            if self.codec_of(self.location.module) is None or not self._is_innermost():
                return NotImplemented
            return rewrite(self, call)

        return run

    def _is_innermost(self) -> bool:
        """Whether this pass gets the tensors saved now, not hooks that others set inside it.

        Checkpointing sets hooks that drop the saved tensors, and checks that the second run saves the
        same tensors. Under these hooks, operations must not be rewritten.
        """
        top: Any = top_hooks(True)
        return top is not None and top[0] == self.hooks[0]

    def _saved(self, x: Tensor, codec: Codec | None, role: str | None) -> SavedTensor:
        location = self.location
        op = "checkpoint" if role is CHECKPOINT_INPUT else location.op
        return SavedTensor(
            x, op, location.qualified_module, codec, location.call, location.module_type,
            role, location.module, location.compiled and location.call is NO_CALL)

    def originals(self, x: Tensor) -> Sequence[Tensor]:
        """Returns the tensors that plain autograd would have saved, if a listener wants them."""
        return self._originals(x) if self.listeners else ()

    def _originals(self, x: Tensor) -> Sequence[Tensor]:
        """Returns the tensors that plain autograd would have saved.

        In a rewritten call, the first saved tensor reports all of them, and the others report none.
        """
        if self._substitution is None:
            return (x,)
        originals, self._substitution.originals = self._substitution.originals, []
        return originals

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
        waiting, self._waiting = self._waiting, Waiting(self.location)
        norms, self._norms = self._norms, Norms()
        self.close()
        if error is not None:
            waiting.drop()
            norms.drop()
        else:
            waiting.end(NO_CALL)
            norms.end(self)
            # Storing has noted a call again. Its arguments hold the graph.
            self.location.rounding = None
        # PyTorch's own message contains these words.
        if isinstance(error, RuntimeError) and "support saved tensor hooks" in str(error):
            raise RuntimeError(_TRANSFORM.format(self.location.module_in(traceback))) from error

    def close(self) -> None:
        """Removes all that the pass installed; call it again, in ``finally``, after the ``with`` block.

        See NOTE [ Interrupts ].
        """
        if not self._closed:
            if self._hooked:
                remove_hooks(self.hooks[0])
            leave(self.location)
            self._resources.close()
            self._closed = True
            # Drop the hooks, because they hold the pass. Otherwise the pass and its modules would wait
            # for the garbage collector.
            self.hooks = unpack, unpack
            # An exception in the middle of a norm leaves it pending. The norm's output may be held here,
            # and its graph holds the pack hook, which holds this pass: no collector finds that cycle.
            self._substitution = None
            self._waiting.drop()
            self._norms.drop()
