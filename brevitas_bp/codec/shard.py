"""The part of a distributed tensor that this process holds, stored in place of the whole."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from brevitas_bp.codec.base import PLAIN, Codec, Packed, is_plain
from brevitas_bp.codec.layout import TensorLayout


def is_dtensor(x: Any) -> bool:
    """Whether ``x`` is a ``torch.distributed.tensor.DTensor``; a parameter may be one too."""
    # Who has one has imported the module; importing it here would cost everybody else its time.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def shard_of(x: Tensor) -> Tensor:
    """The shard that this process holds of a DTensor; any other tensor itself.

    The result of a collective that may still be under way is waited for: the operation that saves it
    has done so, too.
    """
    if type(x) in PLAIN:
        return x
    if is_dtensor(x):
        x = x._local_tensor  # pyright: ignore[reportAttributeAccessIssue]
    collectives = sys.modules.get("torch.distributed._functional_collectives")
    if collectives is not None and isinstance(x, collectives.AsyncCollectiveTensor):
        x = x.trigger_wait()  # pyright: ignore[reportAttributeAccessIssue]
    return x


def placements_of(x: Any) -> tuple[Any, Any] | None:
    """Device mesh and placements of a DTensor; None for other tensors."""
    return (x.device_mesh, x.placements) if is_dtensor(x) else None


def is_storable(x: Tensor) -> bool:
    """Whether a codec may take apart ``x``, or the shard of it that is here.

    Not integers of a DTensor: how they are narrowed follows from the shape of the whole.
    """
    if not is_dtensor(x):
        return is_plain(shard_of(x))
    return is_plain(shard_of(x)) and (x.is_floating_point() or x.dtype == torch.bool)


def is_partial(x: Any) -> bool:
    """Whether ``x`` is a DTensor of which the processes hold summands."""
    return is_dtensor(x) and any(placement.is_partial() for placement in x.placements)


def on_shards(function: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    """An elementwise function of two tensors of one shape; of DTensors, computed shard by shard.

    So ``function`` need not be one that PyTorch can distribute.

    Args:
        function: of two ordinary tensors.
        x: any tensor that is not a sum still to be taken.
        y: placed like ``x``.
    """
    placed = placements_of(x)
    if placed is None:
        return function(x, y)
    assert placed == placements_of(y), (x, y)
    return _distributed(function(shard_of(x), shard_of(y)), placed, x.shape, x.stride())


def _distributed(
        shard: Tensor, placed: tuple[Any, Any], shape: torch.Size, stride: Sequence[int]) -> Tensor:
    """The DTensor that has this shard; nothing is communicated."""
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        return DTensor.from_local(
            shard, *placed, run_check=False, shape=shape, stride=tuple(stride))


class ShardCodec(Codec):
    """Stores the local shard with another codec; decodes to a DTensor placed as the original.

    Processes that hold replicas of one shard decode the same only if they encode with the same seed.

    Args:
        codec: of the shard.
    """

    # The payload of the shard checks itself.
    owns = False

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.name = codec.name
        self.compresses = codec.compresses

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Stores the shard of ``x``, and how ``x`` is placed."""
        packed = self.codec.encode(shard_of(x), seed=seed, where=where)
        # Bytes are those of the shard.
        layout = TensorLayout(x.shape, x.stride(), packed.layout.base_shape, x.dtype, x.device)
        return Packed(self, packed.tensors, layout, (packed, placements_of(x)), where)

    def decode(self, packed: Packed) -> Tensor:
        """A tensor like the one stored; nothing is communicated."""
        shard, placed = packed.facts
        x = shard.decode()
        return x if placed is None else _distributed(
            x, placed, packed.layout.shape, packed.layout.stride)

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        """That of the shard's codec, for the layout of the shard."""
        return self.codec.stored_nbytes(layout)
