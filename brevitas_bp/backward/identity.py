"""Keys by which saved tensors with equal values are found. See NOTE [ One encode per key ]."""

from collections.abc import Hashable

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from brevitas_bp.backward.saved import Call, Decision, SavedTensor, storage_id
from brevitas_bp.codec.keep import version_of
from brevitas_bp.codec.shard import placements_of, shard_of


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
