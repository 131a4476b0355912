"""Keys by which a saved tensor is found again.

* :func:`identity_of`: equal values in equal shape and strides. So tensors share an encoding.
* :func:`~brevitas_bp.backward.saved.place_of`: the same elements, unchanged, in any shape and strides.
* :func:`~brevitas_bp.backward.saved.memory_key` and :class:`Place`: the same memory, whatever has been
  written to it since. Who uses them asks for the version and the order of the elements by himself.

See NOTE [ One encode per key ] in :mod:`brevitas_bp.backward.encoding`.
"""

from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from brevitas_bp.backward.saved import Call, Decision, SavedTensor, memory_key, storage_id
from brevitas_bp.codec.keep import version_of
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.shard import placements_of, shard_of


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
        return cls(StorageWeakRef(x.untyped_storage()), memory_key(x), dense_layout(x))


def dense_layout(x: Tensor) -> TensorLayout | None:
    """Returns the layout of a tensor whose elements fill a stretch of memory, each in its own place."""
    layout = TensorLayout.of(x)
    # A layout closes gaps.
    return layout if layout.stride == x.stride() and layout.base_shape == x.shape else None


def key_of_input(saved: SavedTensor, decision: Decision) -> Hashable:
    """Returns a key that is equal for inputs of norms with equal statistics, stored alike."""
    return "norm", *_identity(saved.tensor), id(decision.codec), settings_of(saved.call)


def storage_of(x: Tensor) -> StorageWeakRef:
    """Returns a reference to a tensor's storage, or that of its shard, which does not keep it alive."""
    return StorageWeakRef(shard_of(x).untyped_storage())


def identity_of(saved: SavedTensor) -> tuple[Hashable, ...]:
    """Returns a key that is equal for saved tensors with equal values: see :func:`_identity`.

    Copies are equal if they are copies of one tensor.
    """
    if saved.copied is None:
        return _identity(saved.tensor)
    x = saved.tensor
    return "copy", *_identity(saved.copied), x.shape, x.stride(), x.dtype


def _identity(x: Tensor) -> tuple[Hashable, ...]:
    """Returns a key that is equal for tensors with equal values, as long as their storage lives.

    An in-place change of a DTensor raises the version of the DTensor itself, not that of its shard.
    """
    shard = x if type(x) is Tensor else shard_of(x)
    of_shard = (storage_id(shard), shard.storage_offset(), shard.shape, shard.stride(), x.dtype,
                version_of(shard), shard.is_conj(), shard.is_neg())
    if shard is x:
        return of_shard
    return *of_shard, type(x), version_of(x), x.shape, placements_of(x)


def settings_of(call: Call) -> Hashable:
    """Returns the name of a call's function and all arguments except tensors, in their order."""
    others = [a for a in call.arguments if not (a is None or isinstance(a, Tensor))]
    return call.name, *(a if isinstance(a, float) else str(a) for a in others)
