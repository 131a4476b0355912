"""What a forward pass has stored about tensors that other operations may save.

See NOTE [ Given what is stored already ] in :mod:`brevitas_bp.codec.given`.
"""

import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from brevitas_bp.activations.predictions import PREDICTIONS, Prediction
from brevitas_bp.backward.rows import LEAST_ROW
from brevitas_bp.backward.saved import Decision, SavedTensor, storage_id
from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.given import DifferenceCodec, MaskedCodec
from brevitas_bp.codec.keep import version_of
from brevitas_bp.codec.rows import Rows
from brevitas_bp.format.differences import CHUNK


class Place(NamedTuple):
    """The memory of a tensor: its storage, and which elements of it.

    Attributes:
        storage: the storage, which this does not keep alive.
        key: equal for views of the same elements, as long as the storage lives.
        shape: shape of the tensor.
        stride: strides of the tensor; None: it has gaps, or elements that share memory.
    """

    storage: StorageWeakRef
    key: Hashable
    shape: torch.Size
    stride: tuple[int, ...] | None

    @classmethod
    def of(cls, x: Tensor) -> "Place":
        """Returns the place of an ordinary tensor."""
        stride = x.stride() if is_dense(x) else None
        return cls(StorageWeakRef(x.untyped_storage()), _key(x), x.shape, stride)


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
        if prediction is None or output is None or derivative.codec.keeps:
            return
        if derivative.layout.stride in ((), output.stride):
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
        hint = self._hints.get(_key(x))
        packed = None if hint is None else hint.packed()
        if hint is None or packed is None or not _same_order(hint.place, x):
            return codec
        row = _row(saved, decision, rows)
        if hint.prediction is None:
            return MaskedCodec(codec, packed, row) if version_of(x) == hint.version else codec
        # A change of ``x`` since then makes the prediction worse, but not wrong. Ranges are compared in
        # the units of ``codec``, so chunks may hold several channels.
        if decision.units == "channel":
            row = x.numel() if rows is None else rows.length if rows.order is None else None
        if row is None or not _ends_with_buckets(codec.bucket_elements, row):
            return codec
        return DifferenceCodec(codec, packed, hint.prediction, row)


def _key(x: Tensor) -> Hashable:
    return storage_id(x), x.storage_offset(), x.numel(), x.dtype


def _same_order(place: Place, x: Tensor) -> bool:
    """Whether elements at equal places in memory are the same elements."""
    if place.stride is None or not is_dense(x):
        return False
    return (place.shape, place.stride) == (x.shape, x.stride()) or (
        x.is_contiguous() and is_contiguous(place.shape, place.stride))


def is_dense(x: Tensor) -> bool:
    """Whether the elements of ``x`` fill a stretch of memory, each in a place of its own."""
    return x.is_contiguous() or is_contiguous(*zip(*sorted(
        ((n, s) for n, s in zip(x.shape, x.stride()) if n != 1), key=lambda d: -d[1])))


def is_contiguous(shape: Sequence[int] = (), stride: Sequence[int] = ()) -> bool:
    """Whether strides are those of a contiguous tensor."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride)):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _ends_with_buckets(bucket: int | None, row: int) -> bool:
    """Whether no bucket lies in two chunks. Their differences might have other means."""
    return bucket is not None and (CHUNK % bucket == 0 or row <= CHUNK)


def _row(saved: SavedTensor, decision: Decision, rows: Rows | None) -> int | None:
    """Returns the number of consecutive elements that backward multiplies by the same gradients."""
    x = saved.tensor
    if decision.units == "channel":
        plane = math.prod(x.shape[2:])
        return plane if x.is_contiguous() and plane >= LEAST_ROW else None
    if rows is None:
        return x.numel()
    return rows.length if rows.order is None and x.numel() % rows.length == 0 else None
