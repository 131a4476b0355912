"""Stores the part of a distributed tensor that this process holds, in place of the whole tensor."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from brevitas_bp.codec.base import PLAIN, Codec, Packed, is_plain
from brevitas_bp.codec.layout import TensorLayout


def is_dtensor(x: Any) -> bool:
    """Whether ``x`` is a ``torch.distributed.tensor.DTensor``; a parameter may be one too."""
    # Anyone holding a DTensor has already imported the module. Importing it here would cost all others
    # time.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def shard_of(x: Tensor) -> Tensor:
    """Returns the shard of a DTensor that this process holds; any other tensor itself.

    If a collective still computes the tensor, this function waits for the result. The operation that
    saves the tensor has waited too.
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
    """Returns device mesh and placements of a DTensor; None for other tensors."""
    return (x.device_mesh, x.placements) if is_dtensor(x) else None


def is_storable(x: Tensor) -> bool:
    """Whether a codec may take apart ``x``, or the local shard of ``x``.

    Integers of a DTensor are excluded: the shape of the whole tensor decides how they are narrowed.
    """
    if not is_dtensor(x):
        return is_plain(shard_of(x))
    return is_plain(shard_of(x)) and (x.is_floating_point() or x.dtype == torch.bool)


def is_partial(x: Any) -> bool:
    """Whether ``x`` is a DTensor whose processes hold summands."""
    return is_dtensor(x) and any(placement.is_partial() for placement in x.placements)


def on_shards(function: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Applies an elementwise function to two tensors of one shape; to DTensors, shard by shard.

    So PyTorch need not be able to distribute ``function``.

    Args:
        function: a function of two ordinary tensors.
        x: any tensor except a DTensor whose processes hold summands.
        y: a tensor placed like ``x``.
    """
    placed = placements_of(x)
    if placed is None:
        return function(x, y)
    assert placed == placements_of(y), (x, y)
    return _distributed(function(shard_of(x), shard_of(y)), placed, x.shape, x.stride())


def _distributed(
        shard: Tensor, placed: tuple[Any, Any], shape: torch.Size, stride: Sequence[int]) -> Tensor:
    """Returns the DTensor that has this shard, without communication."""
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        return DTensor.from_local(
            shard, *placed, run_check=False, shape=shape, stride=tuple(stride))


class ShardCodec(Codec):
    """Stores the local shard with another codec; decodes to a DTensor placed like the original.

    Processes that hold replicas of one shard decode equal values only if they encode with the same seed.

    Args:
        codec: codec of the shard.
    """

    # The payload of the shard checks itself.
    owns = False

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.name = codec.name
        self.compresses = codec.compresses

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Stores the shard of ``x``, and the placements of ``x``."""
        packed = self.codec.encode(shard_of(x), seed=seed, where=where)
        # The layout counts the bytes of the shard.
        layout = TensorLayout(x.shape, x.stride(), packed.layout.base_shape, x.dtype, x.device)
        return Packed(self, packed.tensors, layout, (packed, placements_of(x)), where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns a tensor like the stored one, without communication."""
        shard, placed = packed.facts
        x = shard.decode()
        return x if placed is None else _distributed(
            x, placed, packed.layout.shape, packed.layout.stride)

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        """Returns the bytes that the shard's codec states, for the layout of the shard."""
        return self.codec.stored_nbytes(layout)
