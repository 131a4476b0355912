"""Encodes saved tensors as decided: in their rows and units, once, and only if the result is smaller.

NOTE [ One encode per key ]
1. Operations that save the same tensor share one encoding. "The same" means an equal key:
   * the tensor's storage, offset, shape, strides, dtype and version,
   * the tensor's lazy conjugation or negation,
   * the codec and the units,
   * the call, if the policy says that the rounding must not be shared.
   An operation that may share also takes an encoding of the same elements in another shape, or with
   more bits.
2. A table holds the encodings. It holds the storage by a weak reference. This keeps the address from
   being reused, but it does not keep the memory.
3. The table holds the ``Packed`` weakly too: it lives exactly as long as the graph nodes that need it.
4. The table lives as long as the forward pass.
"""

import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from brevitas_bp.backward.classes import classes_dim, codec_of_targets, softmax_dim
from brevitas_bp.backward.computable import Computable
from brevitas_bp.backward.elementary import form_of
from brevitas_bp.backward.hints import Hints
from brevitas_bp.backward.identity import (
    dense_layout,
    identity_of,
    key_of_input,
    settings_of,
    storage_of,
)
from brevitas_bp.backward.kept import KEEP, Kept, derived_of, described, kept
from brevitas_bp.backward.outputs import OutputForm
from brevitas_bp.backward.rows import last_dimension
from brevitas_bp.backward.saved import NO_CALL, Decision, SavedTensor, place_of
from brevitas_bp.backward.units import NormUnits, channel_units
from brevitas_bp.codec.base import Codec, Packed, is_plain, is_smaller
from brevitas_bp.codec.computed import ComputedCodec
from brevitas_bp.codec.formed import FormCodec
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.normalized import NormalizedCodec, QuotientCodec
from brevitas_bp.codec.on_backward import QuantizeOnBackward
from brevitas_bp.codec.probabilities import ClassErrorCodec, LogCodec, SimplexCodec
from brevitas_bp.codec.rows import ReorderedCodec, Rows, in_rows
from brevitas_bp.codec.shard import ShardCodec, is_storable, shard_of

# Below this many elements, we ask before encoding whether the result can be smaller.
_SMALL = 1024

# Stands for all operations, in place of the number of a call.
_SHARED = -1

#: Codec of a tensor -> codec that stores the tensor in the units in which backward uses it.
InUnits = Callable[[Codec], Codec]


class Encodings:
    """The encodings of one forward pass. See NOTE [ One encode per key ].

    Args:
        next_seed: returns the seed of the next encode.
        on_backward: keep floats, and quantize them when backward asks.
        verify: seal each ``Packed`` with a checksum.

    Attributes:
        given_bytes: size before encoding of the tensors that were encoded on the CPU.
        hints: what the encodings tell about other tensors.
        computable: outputs that backward can compute.
    """

    def __init__(
            self, next_seed: Callable[[], int], on_backward: bool = False, verify: bool = False) -> None:
        self.given_bytes = 0
        self.hints, self.computable = Hints(), Computable()
        self._next_seed = next_seed
        self._on_backward = on_backward
        self._verify = verify
        self._encoded: dict[Any, tuple[StorageWeakRef, weakref.ref[Packed]]] = {}
        # The last encoding of each contiguous tensor in its own units that operations may share.
        self._finest: dict[Any, tuple[StorageWeakRef, Callable[[], Packed | None]]] = {}
        self._order_at: defaultdict[Any, itertools.count[int]] = defaultdict(itertools.count)
        # Numbers for tensors of custom Functions that share their encoding with no other tensor.
        self._apart = itertools.count(-2, -1)

    def encode_once(
            self, saved: SavedTensor, decision: Decision, units: NormUnits | None = None,
            anew: bool = False) -> Packed:
        """Returns the ``Packed`` of a saved tensor, which other saved tensors may share.

        Args:
            saved: the tensor.
            decision: how the tensor is stored.
            units: units of the norm whose input the tensor is; None for other tensors.
            anew: the tensor may be modified after this call, even if it is encoded only in backward.
        """
        rows = _rows_of(saved, decision, units)
        codec = KEEP if decision.codec is None else (
            decision.codec if rows is None else in_rows(decision.codec, rows))
        computed = self.computable.codec_for(saved, decision, codec)
        number = self._number(saved, decision)
        key = (*identity_of(saved), id(codec), decision.units, computed is None, number,
               # Norms of one kind with equal settings compute equal statistics of one tensor.
               None if units is None else settings_of(saved.call))
        before = self._encoded.get(key)
        packed = None if before is None else before[1]()
        if packed is not None:
            return packed
        held = storage_of(saved.tensor if saved.copied is None else saved.copied)
        may_share = number == _SHARED and saved.tensor.is_contiguous() and (
            type(saved.tensor) is Tensor and decision.units in (None, "sum of one"))
        if may_share and decision.units is None and (
                packed := self._finer(saved.tensor, codec) or self._copied(saved, codec)) is not None:
            self._encoded[key] = held, weakref.ref(packed)
            return packed
        in_units = self._units_of(saved, decision, units)
        if computed is not None:
            codec, in_units = computed, None
        elif units is None and decision.units in (None, "channel"):
            in_units = partial(self._given, in_units, saved, decision, rows)
        given = saved
        if anew and self._on_backward:
            given = replace(saved, tensor=saved.tensor.detach().clone())
        packed = self._encode(given, codec, in_units)
        if decision.zeros_outside:
            self._note_mask(saved, codec, packed)
        self._encoded[key] = held, weakref.ref(packed)
        if may_share:
            self._offer(saved.tensor, packed, codec)
        return packed

    def note_input_of_norm(
            self, saved: SavedTensor, decision: Decision, packed: Packed) -> None:
        """Notes how the input of a norm is stored, for other norms of it."""
        self._encoded[key_of_input(saved, decision)] = (
            storage_of(saved.tensor), weakref.ref(packed))

    def input_of_norm(self, saved: SavedTensor, decision: Decision) -> Packed | None:
        """Returns the input of a norm, if another norm with equal settings has stored it."""
        found = self._encoded.get(key_of_input(saved, decision))
        return None if found is None else found[1]()

    def encode_output(
            self, saved: SavedTensor, decision: Decision, form: OutputForm,
            output: Tensor) -> Packed | None:
        """Stores the output of a norm, which other operations may share, or the input in other units.

        Args:
            saved: the input.
            decision: how the input is to be stored.
            form: what is stored.
            output: the output.

        Returns:
            The ``Packed`` of ``form.tensor``; None if it would not be smaller.
        """
        stored = self.encode_once(
            replace(saved, tensor=form.tensor, original=None),
            decision._replace(units=None, rows=last_dimension), anew=True)
        if stored.codec.keeps:
            return None
        if form.to_output is not None:
            # What the table holds must not keep the encoding alive.
            self._finest[place_of(output)] = storage_of(output), partial(
                _output_of, weakref.ref(stored), form.to_output, form.owned_by_output,
                TensorLayout.of(output), self._verify)
        return stored

    def computed_from(
            self, stored: Packed, compute: Callable[[Tensor], Tensor], saved: SavedTensor,
            owned: tuple[Tensor, ...] = ()) -> Packed:
        """Returns the ``Packed`` of a tensor of a norm that is computed from the stored output.

        Args:
            stored: the output.
            compute: what ``stored`` decodes to -> the tensor.
            saved: the tensor.
            owned: what is kept for it alone.
        """
        codec = ComputedCodec(f"{stored.codec.name}, as output", compute, stored, owned)
        return self._sealed(codec.encode(saved.tensor, where=stored.where))

    def _note_mask(self, saved: SavedTensor, codec: Codec, packed: Packed) -> None:
        if type(saved.tensor) is not Tensor or not codec.masks:
            return
        if packed.codec is codec:
            self.hints.note_mask(saved.tensor, weakref.ref(packed))
        elif self._on_backward:
            mask = codec.encode(saved.tensor, seed=0)
            self.hints.note_mask(saved.tensor, lambda: mask)

    def _offer(self, x: Tensor, packed: Packed, codec: Codec) -> None:
        """Offers the encoding of a tensor to other operations that save it."""
        plain = packed.codec.without_units(packed)
        if plain.codec.is_finer_than(codec):
            # What ``packed`` holds lives as long as ``packed``.
            held = plain is packed or packed.codec.wraps
            self._finest[place_of(x)] = (
                storage_of(x), weakref.ref(plain) if held else lambda: plain)

    def _finer(self, x: Tensor, codec: Codec) -> Packed | None:
        """Returns an encoding of a tensor that has at least as many bits as ``codec``."""
        found = self._finest.get(place_of(x))
        packed = None if found is None else found[1]()
        if packed is None or not packed.codec.is_finer_than(codec):
            return None
        if packed.layout.shape == x.shape:
            return packed
        return self._sealed(replace(packed, layout=TensorLayout.of(x), seal=None))

    def _copied(self, saved: SavedTensor, codec: Codec) -> Packed | None:
        """Returns a copy's encoding that follows from an encoding of what was copied."""
        x = saved.copied
        if x is None or type(x) is not Tensor or (dense := dense_layout(x)) is None:
            return None
        found = self._finest.get(place_of(x))
        packed = None if found is None else found[1]()
        if packed is None or not packed.codec.is_finer_than(codec):
            return None
        copy = ComputedCodec(packed.codec.name, partial(_arranged, dense), packed)
        return self._sealed(copy.encode(saved.tensor, where=packed.where))

    def _units_of(
            self, saved: SavedTensor, decision: Decision, units: NormUnits | None) -> InUnits | None:
        """Returns the units in which backward uses a tensor; None: the tensor's own units."""
        if units is not None:
            return partial(_normalized, units)
        if decision.codec is None:
            return None
        if decision.units == "quotient" and (divisor := _divisor_of(saved)) is not None:
            return partial(QuotientCodec, divisor)
        if decision.units == "channel" and is_plain(saved.tensor):
            return partial(_in_channels, saved.tensor)
        if decision.units == "sum of one" and is_plain(saved.tensor):
            dim = softmax_dim(saved.call, saved.tensor)
            return lambda inner: SimplexCodec(inner, dim)
        # A user's codec in place of the policy's may decode negative numbers, which have no logarithm.
        if decision.units == "logarithm" and decision.codec.keeps_sign:
            return LogCodec
        if decision.units == "class error" and decision.codec.keeps_sign:
            return self._class_errors(saved)
        if decision.units == "derivative" and decision.codec.keeps_sign and (
                form := form_of(saved.call)) is not None:
            return lambda inner: FormCodec(inner, form)
        return None

    def _given(
            self, in_units: InUnits | None, saved: SavedTensor, decision: Decision, rows: Rows | None,
            codec: Codec) -> Codec:
        return self.hints.apply(
            codec if in_units is None else in_units(codec), saved, decision, rows)

    def _class_errors(self, saved: SavedTensor) -> InUnits:
        """Stores the targets of a loss, and returns the units of its errors."""
        targets, codec = saved.call.argument(1, "target"), codec_of_targets(saved.call)
        stored = self.encode_once(replace(saved, tensor=targets), Decision(codec, "targets"))
        return lambda inner: ClassErrorCodec(inner, stored, classes_dim(saved.tensor))

    def _number(self, saved: SavedTensor, decision: Decision) -> int:
        """Returns _SHARED if all operations share the encoding, else the number of the owning call."""
        # Derivatives never share an encoding, whatever tensor they are computed from.
        if decision.shared and saved.derivative is None:
            return _SHARED
        return saved.call.number if saved.call is not NO_CALL else next(self._apart)

    def _encode(self, saved: SavedTensor, codec: Codec, in_units: InUnits | None) -> Packed:
        where = described(saved.op, saved.module)
        if codec.per_site:
            codec = codec.at_site((where, next(self._order_at[codec, where])))
        if in_units is not None:
            codec = in_units(codec)
        if codec.keeps:
            return kept(saved)
        shard = shard_of(saved.tensor)
        if shard is not saved.tensor:
            codec = ShardCodec(codec)
        if not codec.compresses:
            return self._sealed(codec.encode(derived_of(saved), seed=0, where=where))
        if self._cannot_pay(codec, shard):
            return kept(saved)
        if self._on_backward and not codec.computes:
            # We know whether the encoding is smaller only after backward has asked for it.
            return self._stored(saved, QuantizeOnBackward(codec), where)
        packed = self._sealed(self._stored(saved, codec, where))
        if not packed.is_smaller:
            return kept(saved)
        if packed.layout.device.type == "cpu":
            self.given_bytes += packed.layout.nbytes
        return packed

    def _cannot_pay(self, codec: Codec, x: Tensor) -> bool:
        """Whether it is clear before encoding that the result would not be smaller.

        Large tensors are encoded without this check. An exception are tensors in other units that are
        encoded later: whether the mean that belongs to the tensor is kept must be known now.
        """
        if x.numel() >= _SMALL and not (self._on_backward and codec.wraps):
            return False
        layout = TensorLayout.of(x)
        least = codec.stored_nbytes(layout)
        return least is not None and not is_smaller(least, layout.nbytes)

    def _stored(self, saved: SavedTensor, codec: Codec, where: str) -> Packed:
        if saved.derivative is None:
            return codec.encode(saved.tensor, seed=self._next_seed(), where=where)
        return codec.encode_derivative(
            saved.tensor, saved.derivative, seed=self._next_seed(), where=where)

    def _sealed(self, packed: Packed) -> Packed:
        return packed.sealed() if self._verify else packed


def can_encode(x: Tensor) -> bool:
    """Whether a codec can take ``x``: an ordinary tensor with elements, or a DTensor of such shards."""
    if type(x) is Tensor:
        return is_plain(x) and x.numel() > 0
    return is_storable(x) and shard_of(x).numel() > 0


def _rows_of(saved: SavedTensor, decision: Decision, units: NormUnits | None) -> Rows | None:
    """Returns the rows with which the buckets of a tensor end."""
    # The rows of a norm's input follow from its units.
    if decision.codec is None or decision.rows is None or units is not None:
        return None
    return decision.rows(shard_of(saved.tensor), saved.call)


def _normalized(units: NormUnits, codec: Codec) -> Codec:
    """Wraps the codec of a norm's input, so that it stores the input in ``units``."""
    rows = units.rows
    if rows is not None:
        codec = in_rows(codec, rows._replace(order=None))
    codec = NormalizedCodec(codec, units.affine, units.undo)
    return codec if rows is None or rows.order is None else ReorderedCodec(codec, rows.order)


def _in_channels(x: Tensor, codec: Codec) -> Codec:
    """Wraps the codec of an input whose channels are each multiplied by their own gradients."""
    units = channel_units(x)
    return codec if units is None else _normalized(units, codec)


def _divisor_of(saved: SavedTensor) -> Callable[[], Tensor] | None:
    """Keeps the divisor of a quotient exact, and returns a function that gives it back.

    Returns None unless the quotient has the shape of its dividend.
    """
    divisor = saved.call.argument(1, "other")
    x = saved.tensor
    if not (isinstance(divisor, Tensor) and is_plain(divisor) and is_plain(x)):
        return None
    if not divisor.is_floating_point() or TensorLayout.base(x).shape != x.shape or (
            torch.broadcast_shapes(divisor.shape, x.shape) != x.shape):
        return None
    return Kept(divisor, saved.call.function, saved.module).decode


def _arranged(layout: TensorLayout, x: Tensor) -> Tensor:
    """Returns a contiguous tensor's elements as a view of another layout shows them."""
    return layout.restore_flat(x.view(-1))


def _output_of(
        found: "weakref.ref[Packed]", compute: Callable[[Tensor], Tensor], owned: tuple[Tensor, ...],
        layout: TensorLayout, verify: bool) -> Packed | None:
    """Returns the output of a norm, which follows from what is stored for the input, if that lives."""
    source = found()
    if source is None:
        return None
    packed = ComputedCodec(source.codec.name, compute, source, owned).noted(layout, source.where)
    return packed.sealed() if verify else packed
