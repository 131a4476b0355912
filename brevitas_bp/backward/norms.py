"""Stores the inputs of norms, after the norm has ended.

NOTE [ RMS norms are stored as outputs ]
1. ``y = weight * (x * rstd)`` saves ``x`` twice, and ``x * rstd``. The layer after it saves ``y``. All
   four follow from ``y`` and from numbers that are kept anyway.
2. So tensors of such a norm wait. When the product with the weight has ended, its output is stored, as
   in NOTE [ Inputs of norms are stored as outputs ].
3. If this product does not come within a few operations, the tensors are stored one by one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from brevitas_bp.backward.encoding import Encodings
from brevitas_bp.backward.kept import Kept, kept
from brevitas_bp.backward.location import Location
from brevitas_bp.backward.origins import leads_to
from brevitas_bp.backward.outputs import output_form, output_form_of_product
from brevitas_bp.backward.parameters import is_function_of_parameter
from brevitas_bp.backward.saved import (
    NO_CALL,
    Call,
    Decision,
    SavedTensor,
    place_of,
    storage_id,
    tensors_in,
    without_class,
)
from brevitas_bp.backward.units import Deferred, NormUnits, PendingNorm, units_of
from brevitas_bp.backward.views import CAST_NODES
from brevitas_bp.backward.waiting import may_wait
from brevitas_bp.codec.base import Packed, is_plain
from brevitas_bp.codec.keep import version_of
from brevitas_bp.codec.shape_only import zeros
from brevitas_bp.private import node_number

_CENTRED = Decision(None, "the input is stored as its deviation from the mean")
# Operations between the square and the product with the weight: mean, epsilon, root, product, casts.
_MOST_CALLS = 12

#: Returns the tensors that plain autograd would have saved.
Originals = Callable[[], Sequence[Tensor]]


class StoringPass(Protocol):
    """The part of a forward pass that stores tensors."""

    location: Location
    encodings: Encodings
    listeners: Any

    def store(
            self, saved: SavedTensor, decision: Decision, units: NormUnits | None = None) -> Packed:
        """Encodes or keeps a tensor."""
        ...

    def keep(self, saved: SavedTensor, decision: Decision) -> Kept:
        """Keeps a tensor."""
        ...

    def finish(
            self, saved: SavedTensor, decision: Decision,
            originals: Sequence[Tensor]) -> Packed | Kept:
        """Stores a tensor by itself."""
        ...

    def tell(
            self, saved: SavedTensor, packed: Packed, decision: Decision,
            originals: Sequence[Tensor]) -> None:
        """Tells how a tensor was stored."""
        ...


@dataclass(eq=False)
class _Entry:
    """A saved tensor that waits.

    Attributes:
        saved: the tensor.
        decision: how it is to be stored if it is stored by itself.
        originals: the tensors that plain autograd would have saved, for listeners.
        deferred: the object that autograd holds.
        kept: the tensor as it was when it was saved.
        normalized: whether it is the normalized input, not the input.
    """

    saved: SavedTensor
    decision: Decision
    originals: Sequence[Tensor]
    deferred: Deferred
    kept: Kept
    normalized: bool

    @property
    def is_unchanged(self) -> bool:
        """Whether nobody has modified the tensor while it waited."""
        return version_of(self.saved.tensor) == self.kept.version


class Norms:
    """The norms of one forward pass whose saved tensors wait. The pass must end it."""

    def __init__(self) -> None:
        self._norm: PendingNorm | None = None
        self._written: _WrittenNorm | None = None

    def hold(
            self, running: StoringPass, saved: SavedTensor, decision: Decision,
            originals: Originals) -> Deferred | None:
        """Lets a saved tensor wait if it belongs to a norm; else returns None.

        Args:
            running: the forward pass.
            saved: the tensor.
            decision: how the policy stores it.
            originals: returns the tensors that plain autograd would have saved.
        """
        if decision.units == "statistic" and self._begins(saved, decision):
            return self._begin(running, saved, decision, originals)
        if self._norm is not None and self._norm.has_computed(saved, decision):
            return self._norm.hold(saved, decision)
        written = self._written
        if written is None or not written.takes(saved, decision):
            if not _may_begin(saved, decision) or (
                    written is not None and written.ends_with(saved.call)):
                return None
            self.end(running)
            written = self._written = _WrittenNorm(running, saved, self._forget)
        running.location.note_rounded(saved.call, saved.tensor)
        return written.hold(running, saved, decision, originals)

    def end(self, running: StoringPass) -> None:
        """Stores the tensors that still wait, one by one."""
        if self._written is not None:
            self._written.end(running)

    def drop(self) -> None:
        """Keeps the tensors that wait as they are, after an exception."""
        self._norm = None
        if self._written is not None:
            self._written.drop()

    def _forget(self) -> None:
        self._written = None

    def _begins(self, saved: SavedTensor, decision: Decision) -> bool:
        """Whether a tensor is the input of a norm that is to be stored normalized."""
        if decision.codec is None or not is_plain(saved.tensor):
            return False
        begun = self._norm is not None and self._norm.saved.call is saved.call
        return not begun and may_wait(saved.call)

    def _begin(
            self, running: StoringPass, saved: SavedTensor, decision: Decision,
            originals: Originals) -> Deferred:
        """Defers the encoding of a norm's input until the norm has ended.

        See NOTE [ Inputs of norms are stored normalized ].
        """
        deferred = Deferred()
        self._norm = PendingNorm(saved, decision, deferred, originals())
        if saved.call is NO_CALL:
            # We cannot see when a custom Function ends.
            self._ended(running)
        else:
            running.location.endings.append(partial(self._ended, running))
        return deferred

    @torch.no_grad()
    def _ended(self, running: StoringPass, output: Any = None) -> None:
        """Stores the input of the norm that has ended, and the statistics that it has saved."""
        norm, self._norm = self._norm, None
        assert norm is not None
        packed, drops_mean = self._as_output(running, norm, output), True
        if packed is None:
            units = units_of(norm)
            packed = running.store(norm.saved, norm.decision, units)
            drops_mean = units is not None and units.drops_mean and not packed.codec.keeps
        norm.deferred.fill(packed)
        running.tell(norm.saved, packed, norm.decision, norm.originals)
        mean = norm.statistics[-2][0] if drops_mean else None
        for statistic, decision, deferred in norm.statistics:
            deferred.fill(_store_statistic(running, statistic, decision, statistic is mean))

    def _as_output(self, running: StoringPass, norm: PendingNorm, output: Any) -> Packed | None:
        """Stores the input of a norm as its output; None: it must be stored otherwise."""
        saved, decision = norm.saved, norm.decision
        if len(norm.statistics) < 2 or not decision.uses_outputs or not decision.shared or not (
                isinstance(output, Tensor)):
            return None
        encodings, output = running.encodings, without_class(output)
        running.location.note_rounded(saved.call, saved.tensor)
        if (packed := encodings.input_of_norm(saved, decision)) is not None:
            return packed
        form = output_form(saved.call, saved.tensor, output)
        stored = None if form is None else encodings.encode_output(saved, decision, form, output)
        if form is None or stored is None:
            return None
        running.location.note_rounded(saved.call, output)
        running.location.shared_roundings.join(saved.tensor, output)
        rstd = Kept(norm.statistics[-1][0].tensor, saved.call.function, saved.module).decode
        packed = encodings.computed_from(stored, form.deviation(rstd), saved, form.owned)
        encodings.note_input_of_norm(saved, decision, packed)
        return packed


def _may_begin(saved: SavedTensor, decision: Decision) -> bool:
    """Whether a tensor may be the input of a norm in several operations."""
    return decision.codec is not None and decision.uses_outputs and decision.units is None and (
        decision.shared and saved.call is not NO_CALL and may_wait(saved.call))


class _WrittenNorm:
    """An RMS norm in several operations, or ``F.rms_norm``, which runs them inside.

    See NOTE [ RMS norms are stored as outputs ].

    Args:
        running: the forward pass.
        saved: the input, as it is saved first.
        on_end: called when no tensor waits any more. The norm must not live longer: it holds tensors.
    """

    def __init__(
            self, running: StoringPass, saved: SavedTensor, on_end: Callable[[], None]) -> None:
        self._x, self._on_end = saved.tensor, on_end
        self._entries: list[_Entry] = []
        self._rstd: Kept | None = None
        # The normalized input as it was when it was made, and the number of the node that made it.
        self._normalized: tuple[Kept, int] | None = None
        # The last operation of the norm and its scales, once they are known.
        self._last: Call | None = None
        self._weight: Any = None
        self._calls = 0
        if saved.call.name == "rms_norm":
            self._await(running, saved.call, saved.call.argument(2, "weight"))
        running.location.following.append(partial(self._see, running))

    def takes(self, saved: SavedTensor, decision: Decision) -> bool:
        """Whether a saved tensor belongs to the norm; notes the inverse deviation that it may be."""
        ending = self.ends_with(saved.call)
        if decision.codec is None:
            if ending and saved.is_norm_statistic:
                self._rstd = self._rstd or _as_it_is(saved)
            return False
        if ending:
            # The scales may have as many elements as the input.
            return saved.tensor.shape == self._x.shape and not saved.aliases(self._weight)
        return _may_begin(saved, decision) and (
            saved.call.name != "rms_norm" and _are_same(saved.tensor, self._x))

    def ends_with(self, call: Call) -> bool:
        """Whether a call is the last operation of the norm, which has not ended."""
        return call is self._last

    def hold(
            self, running: StoringPass, saved: SavedTensor, decision: Decision,
            originals: Originals) -> Deferred:
        """Lets a tensor wait that belongs to the norm."""
        if self._entries and saved.call is not self._last:
            self._note_factor(running, saved)
        deferred = Deferred(running.location.follow)
        self._entries.append(_Entry(
            saved, decision, originals(), deferred, _as_it_is(saved),
            not _are_same(saved.tensor, self._x)))
        return deferred

    def _note_factor(self, running: StoringPass, saved: SavedTensor) -> None:
        """Notes the inverse deviation, by which a call multiplies the input, and the call's output."""
        factors = [t for t in tensors_in(saved.arguments) if not saved.aliases(t)]
        if saved.call.is_product and len(factors) == 1:
            self._rstd = Kept(factors[0], saved.call.function, saved.module)
            running.location.endings.append(self._note_normalized)

    def _note_normalized(self, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            self._normalized = Kept(output, None, ""), node_number(output.grad_fn)

    def _await(self, running: StoringPass, last: Call, weight: Any) -> None:
        """Waits for the end of the last operation."""
        self._last, self._weight = last, weight
        running.location.endings.append(partial(self._ended, running))

    def _see(self, running: StoringPass, call: Call) -> None:
        """Called with each call while tensors wait, and with NO_CALL if they must be stored at once."""
        if not self._entries:
            return
        self._calls += 1
        # If a last operation is still waited for, it has failed.
        if call is NO_CALL or self._calls > _MOST_CALLS or self._last is not None:
            self.end(running)
            return
        if self._normalized is not None and (
                weight := _scales_in(call, *self._normalized)) is not None:
            self._await(running, call, weight)
        running.location.following.append(partial(self._see, running))

    @torch.no_grad()
    def _ended(self, running: StoringPass, output: Any) -> None:
        """Stores the tensors of a norm whose last operation has ended."""
        call, rstd = self._last, self._rstd
        if not self._entries or call is None:
            return
        form = None
        if rstd is not None and isinstance(output, Tensor) and (
                all(e.is_unchanged for e in self._entries)):
            output = without_class(output)
            form = output_form(call, self._x, output) if call.name == "rms_norm" else (
                output_form_of_product(call, self._x, output))
        first = self._entries[0]
        stored = None if form is None else running.encodings.encode_output(
            first.saved, first.decision, form, output)
        if form is None or rstd is None or stored is None:
            self.end(running)
            return
        location, entries = running.location, self._taken()
        location.note_rounded(call, output)
        location.shared_roundings.join(output, *(e.saved.tensor for e in entries))
        undo = form.deviation(rstd.decode), form.normalized()
        found: dict[bool, Packed] = {}
        for entry in entries:
            if entry.normalized not in found:
                found[entry.normalized] = running.encodings.computed_from(
                    stored, undo[entry.normalized], entry.saved, form.owned)
            packed = found[entry.normalized]
            entry.deferred.fill(packed)
            running.tell(entry.saved, packed, entry.decision, entry.originals)

    def end(self, running: StoringPass) -> None:
        """Stores the tensors that wait one by one."""
        entries = self._taken()
        # An exported graph would have a trace of the block, even without entries.
        if entries:
            with torch.no_grad():
                for entry in entries:
                    entry.deferred.fill(
                        running.finish(entry.saved, entry.decision, entry.originals)
                        if entry.is_unchanged else entry.kept)

    def drop(self) -> None:
        """Keeps the tensors that wait as they are."""
        for entry in self._taken():
            entry.deferred.fill(entry.kept)

    def _taken(self) -> list[_Entry]:
        """Returns the tensors that wait. None waits then, so the norm has ended."""
        entries, self._entries = self._entries, []
        self._on_end()
        return entries


def _store_statistic(
        running: StoringPass, statistic: SavedTensor, decision: Decision,
        dropped: bool) -> Packed | Kept:
    if not (dropped or running.listeners):
        return running.keep(statistic, decision)
    packed = zeros().encode(statistic.tensor) if dropped else kept(statistic)
    running.tell(
        statistic, packed, _CENTRED if dropped else decision,
        (statistic.tensor,) if running.listeners else ())
    return packed


def _as_it_is(saved: SavedTensor) -> Kept:
    return Kept(saved.tensor, saved.call.function, saved.module)


def _are_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors show the same elements in the same order."""
    return place_of(a) == place_of(b) and a.shape == b.shape and a.stride() == b.stride()


def _scales_in(call: Call, normalized: Kept, node: int) -> Tensor | None:
    """Returns the parameter, or function of one, by which a call multiplies a normalized input.

    Args:
        call: the call.
        normalized: the normalized input, as it was made; perhaps the call has a cast of it.
        node: number of the node that made it.
    """
    tensors = list(tensors_in(call.arguments))
    made = normalized.tensor
    if not call.is_product or len(tensors) != 2 or version_of(made) != normalized.version:
        return None
    first, second = tensors
    for weight, x in ((first, second), (second, first)):
        if weight.dim() == 1 and x.shape == made.shape and x.dim() > 1 and (
                weight.shape[0] == x.shape[-1] and is_function_of_parameter(weight)):
            unchanged = version_of(x) == (
                normalized.version if storage_id(x) == storage_id(made) else 0)
            return weight if unchanged and leads_to(x, node, CAST_NODES) else None
    return None
