"""What a forward pass has stored about tensors that other operations may save.

See NOTE [ Given what is stored already ] in :mod:`brevitas_bp.codec.given`.
"""

import math
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from brevitas_bp.activations.predictions import PREDICTIONS, Prediction
from brevitas_bp.backward.origins import leads_to
from brevitas_bp.backward.parameters import is_function_of_parameter
from brevitas_bp.backward.rows import LEAST_ROW
from brevitas_bp.backward.saved import (
    Decision,
    SavedTensor,
    storage_id,
    tensors_in,
    without_class,
)
from brevitas_bp.codec.base import Codec, Packed, is_plain
from brevitas_bp.codec.computed import ComputedCodec
from brevitas_bp.codec.given import DifferenceCodec, MaskedCodec
from brevitas_bp.codec.keep import version_of
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.rows import Rows, in_rows
from brevitas_bp.codec.wrapping import innermost_of
from brevitas_bp.format.arithmetic import compute_dtype
from brevitas_bp.format.differences import CHUNK
from brevitas_bp.private import node_number

#: Names of elementwise products.
PRODUCTS = frozenset({"mul", "multiply", "__mul__", "__rmul__", "rmul", "imul", "__imul__", "mul_"})


class Place(NamedTuple):
    """The memory of a tensor: its storage, and which elements of it.

    Attributes:
        storage: the storage, which this does not keep alive.
        key: equal for views of the same elements, as long as the storage lives.
        layout: layout of the tensor; None: it has gaps, or elements that share memory.
    """

    storage: StorageWeakRef
    key: Hashable
    layout: TensorLayout | None

    @classmethod
    def of(cls, x: Tensor) -> "Place":
        """Returns the place of an ordinary tensor."""
        return cls(StorageWeakRef(x.untyped_storage()), _key(x), dense_layout(x))


class Computed(NamedTuple):
    """What backward can compute from stored tensors.

    Attributes:
        values: computes it.
        width: least bits of the codes of these tensors.
        name: says in reports from what it is computed.
    """

    values: Callable[[], Tensor]
    width: float
    name: str


class _Hint(NamedTuple):
    place: Place
    packed: Callable[[], Packed | None]
    prediction: Prediction | None
    version: int | None
    computed: "Callable[[], Computed | None] | None" = None
    node: int = -1


class Hints:
    """The hints of one forward pass. They live as long as the pass, and keep no tensor alive."""

    def __init__(self) -> None:
        self._hints: dict[Hashable, _Hint] = {}
        # Number of the running product, position and stored form of its factors.
        self._product: tuple[int, list[tuple[int | None, Any]]] | None = None

    def note_mask(self, x: Tensor, mask: Callable[[], Packed | None]) -> None:
        """Notes that the elements of ``x`` outside a mask are zero; ``mask`` returns it if it lives."""
        place = Place.of(x)
        self._hints[place.key] = _Hint(place, mask, None, version_of(x))

    def note_derivative(
            self, output: Place | None, name: str | None, derivative: Packed) -> None:
        """Notes the derivative of an activation function, if PREDICTIONS has its name.

        Derivatives of other functions tell too little.
        """
        prediction = PREDICTIONS.get(name or "")
        if prediction is None or output is None or output.layout is None or derivative.codec.keeps:
            return
        if derivative.layout.stride in ((), output.layout.stride):
            told = derivative.codec.as_given(derivative)
            found = weakref.ref(derivative) if told is derivative else lambda: told
            self._hints[output.key] = _Hint(output, found, prediction, None)

    def note_factor(
            self, saved: SavedTensor, stored: Any, endings: list[Callable[[Any], None]]) -> None:
        """Notes a stored factor of a running product, and the product if both factors are stored.

        Args:
            saved: the factor.
            stored: what autograd gets in its place.
            endings: called with the output of the product.
        """
        call = saved.call
        if self._product is None or self._product[0] != call.number:
            self._product = call.number, []
            count = sum(1 for _ in tensors_in(call.arguments))
            endings.append(partial(self._note_product, call.number, count))
        self._product[1].append((saved.position, stored))

    def _note_product(self, number: int, count: int, output: Any) -> None:
        product, self._product = self._product, None
        if product is None or product[0] != number or count != 2:
            return
        factors = dict(product[1])
        if set(factors) == {0, 1}:
            found = [weakref.ref(f) for f in factors.values()]

            def computed() -> Computed | None:
                first, second = (f() for f in found)
                return None if first is None or second is None else Computed(
                    partial(_product, first, second), min(width_of(first), width_of(second)),
                    "computed from its factors")

            self.note_computed(output, computed)

    def note_computed(self, output: Any, computed: Callable[[], "Computed | None"]) -> None:
        """Notes that backward can compute the output of an operation, as long as something lives."""
        if isinstance(output, Tensor) and output.grad_fn is not None and (
                is_plain(x := without_class(output))):
            place = Place.of(x)
            if place.layout is not None:
                self._hints[place.key] = _Hint(
                    place, lambda: None, None, version_of(x), computed, node_number(output.grad_fn))

    @staticmethod
    def _computed(
            codec: Codec, saved: SavedTensor, decision: Decision, hint: _Hint) -> Codec:
        """Returns a codec that computes the tensor from others, if these are stored with enough bits."""
        x, made = saved.tensor, hint.place.layout
        useful = decision.may_compute and decision.units is None and version_of(x) == hint.version
        useful = useful and leads_to(saved.arguments[saved.position or 0], hint.node)
        layout = dense_layout(x) if useful else None
        if layout is None or made is None or hint.computed is None:
            return codec
        computed, asked = hint.computed(), innermost_of(codec).bit_widths
        # Computed from tensors with fewer bits, it would have a larger error than is asked for.
        if computed is None or not asked or computed.width < max(asked):
            return codec
        return ComputedCodec(computed.name, partial(_seen_as, computed.values, made, layout))

    def apply(
            self, codec: Codec, saved: SavedTensor, decision: Decision, rows: Rows | None) -> Codec:
        """Returns a codec that takes for given what is known about a tensor; else ``codec`` itself.

        Args:
            codec: stores the tensor.
            saved: the tensor.
            decision: how the tensor is stored.
            rows: rows with which the buckets of ``codec`` end.
        """
        x = saved.tensor
        useful = self._hints and decision.uses_hints and codec.stores_differences
        if not useful or type(x) is not Tensor:
            return codec
        hint = self._hints.get(_key(x))
        if hint is not None and hint.computed is not None:
            return self._computed(codec, saved, decision, hint)
        packed = None if hint is None else hint.packed()
        if hint is None or packed is None or not _same_order(hint.place.layout, dense_layout(x)):
            return codec
        row, in_channels = _row(x, rows), decision.units == "channel"
        if hint.prediction is None:
            row = _plane(x) if in_channels else row
            useful = decision.reach != "all" and version_of(x) == hint.version
            return MaskedCodec(codec, packed, row) if useful else codec
        if decision.reach == "all" and decision.codec is not None:
            rest = decision.codec.for_rest(hint.prediction.spared)
            codec = rest if rows is None else in_rows(rest, rows)
        # A change of ``x`` since then makes the prediction worse, but not wrong. Ranges are compared in
        # the units of ``codec``, so chunks may hold several channels.
        if row is None or codec.bucket_elements is None:
            return codec
        return DifferenceCodec(
            codec, packed, hint.prediction, row, _chunk_of(codec.bucket_elements, row))


def _product(first: Any, second: Any) -> Tensor:
    """Returns the product of two stored factors."""
    a, b = first.decode(), second.decode()
    dtype = compute_dtype(torch.promote_types(a.dtype, b.dtype))
    return a.to(dtype) * b.to(dtype)


def width_of(stored: Any) -> float:
    """Returns the bits of a stored tensor's codes, and one more if it is stored given a derivative."""
    if not isinstance(stored, Packed) or not stored.codec.lossy:
        return math.inf
    codec = stored.codec.postponed
    return min(innermost_of(codec).bit_widths, default=0) + isinstance(codec, DifferenceCodec)


def _seen_as(values: Callable[[], Tensor], made: TensorLayout, seen: TensorLayout) -> Tensor:
    """Computes a tensor of one layout, and returns the same memory in another layout."""
    flat = made.flatten(made.restore(values().to(made.dtype)))
    return torch.as_strided(flat, seen.shape, seen.stride, flat.storage_offset())


def may_be_computed(saved: SavedTensor) -> bool:
    """Whether a layer's input has its history, and the layer's weight is a parameter or function of one.

    Without its history, the input may outlive what it would be computed from.
    """
    own = saved.position
    if own is None or all(t.grad_fn is None for t in tensors_in((saved.arguments[own],))):
        return False
    others = tensors_in(a for i, a in enumerate(saved.arguments) if i != own)
    return all(not t.requires_grad or is_function_of_parameter(t) for t in others)


def _key(x: Tensor) -> Hashable:
    return storage_id(x), x.storage_offset(), x.numel(), x.dtype


def dense_layout(x: Tensor) -> TensorLayout | None:
    """Returns the layout of a tensor whose elements fill a stretch of memory, each in its own place."""
    layout = TensorLayout.of(x)
    # A layout closes gaps.
    return layout if layout.stride == x.stride() and layout.base_shape == x.shape else None


def _same_order(first: TensorLayout | None, second: TensorLayout | None) -> bool:
    """Whether elements at equal places in memory are the same elements."""
    if first is None or second is None:
        return False
    return (first.contiguous and second.contiguous) or (
        (first.shape, first.stride) == (second.shape, second.stride))


def _chunk_of(bucket: int, row: int) -> int:
    """Returns the elements of a chunk, so that no bucket lies in two: their means may differ."""
    if bucket and (CHUNK % bucket == 0 or row <= CHUNK):
        return CHUNK
    return bucket if bucket and bucket % CHUNK == 0 else row


def _row(x: Tensor, rows: Rows | None) -> int | None:
    """Returns the elements of a row; None: rows are not consecutive in memory."""
    if rows is None:
        return x.numel()
    return rows.length if rows.order is None and x.numel() % rows.length == 0 else None


def _plane(x: Tensor) -> int | None:
    """Returns the elements of a channel, if they are consecutive in memory, and enough."""
    plane = math.prod(x.shape[2:])
    return plane if x.is_contiguous() and plane >= LEAST_ROW else None
