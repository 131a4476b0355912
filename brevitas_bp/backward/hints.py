"""What a forward pass has stored about tensors that other operations may save.

See NOTE [ Given what is stored already ] in :mod:`brevitas_bp.codec.given`.
"""

import math
import weakref
from collections.abc import Callable, Hashable
from typing import NamedTuple

from torch import Tensor

from brevitas_bp.activations.predictions import PREDICTIONS, Prediction
from brevitas_bp.backward.identity import Place, dense_layout
from brevitas_bp.backward.rows import LEAST_ROW
from brevitas_bp.backward.saved import Decision, SavedTensor, memory_key
from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.given import DifferenceCodec, MaskedCodec
from brevitas_bp.codec.keep import version_of
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.rows import Rows, in_rows
from brevitas_bp.format.differences import CHUNK


class _Hint(NamedTuple):
    place: Place
    packed: Callable[[], Packed | None]
    prediction: Prediction | None
    version: int | None


class Hints:
    """The hints of one forward pass. They live as long as the pass, and keep no tensor alive."""

    def __init__(self) -> None:
        self._hints: dict[Hashable, _Hint] = {}

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
        hint = self._hints.get(memory_key(x))
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
