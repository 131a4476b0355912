"""The noise of one wrapper: its private stream of seeds, and which processes draw the same noise."""

import copy
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
from torch import nn

from brevitas_bp.backward.transparent import all_modules
from brevitas_bp.codec.shard import is_dtensor
from brevitas_bp.format.random import SeedStream, derive

_AMBIGUOUS = (
    "brevitas_bp.QuantBackwardWrapper: the parameters are DTensors on several device meshes, so it is "
    "not known which processes hold copies of the same activations and must draw the same noise; each "
    "process draws its own noise. Pass rank=, the rank of the data-parallel dimension")
_created = itertools.count()


@final
class Noise:
    """Seeds for the roundings of one wrapper.

    Args:
        seed: seed of the stream. None derives it, at first use, from ``torch.initial_seed()`` and the
            number of streams made before this one, because two wrappers must not share their noise.
        rank: distinguishes the noise of this process from that of other processes. None asks
            ``torch.distributed``, see NOTE [ Replicas draw the same noise ].
    """

    def __init__(self, seed: int | None = None, rank: int | None = None) -> None:
        self._number = next(_created)
        self._stream: SeedStream | None = None if seed is None else SeedStream(seed)
        self._rank = rank
        self._replicas: tuple[int, ...] = ()

    @property
    def stream(self) -> SeedStream:
        """The stream of seeds; each process takes the seeds of its rank."""
        if self._stream is None:
            self._stream = SeedStream(derive(torch.initial_seed(), self._number))
        return self._stream

    def rank(self, root: nn.Module) -> int:
        """Returns the rank of this process.

        Every forward pass asks again, because the wrapper may be older than the process group.

        Args:
            root: the wrapped module.
        """
        if self._rank is not None:
            return self._rank
        # Remember the group: parameters that FSDP has gathered no longer show it.
        self._replicas = replica_group(root) or self._replicas
        if not (dist.is_available() and dist.is_initialized()):
            return 0
        return self._replicas[0] if self._replicas else dist.get_rank()

    def seeds(self, root: nn.Module) -> Callable[[], int]:
        """Returns a function that gives one seed after the other, for a forward pass of ``root``."""
        return partial(self.stream.next, self.rank(root))

    def of_replica(self, root: nn.Module) -> "Noise":
        """Returns noise for a replica of ``nn.DataParallel``, which runs while other replicas run."""
        other = copy.copy(self)
        other._stream = SeedStream(derive(self.stream.next(self.rank(root)), 0))
        return other

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Within the block, draws from a stream of ``seed``; the wrapper's own stream stands still."""
        before, self._stream = self._stream, SeedStream(seed)
        try:
            yield
        finally:
            self._stream = before

    def __deepcopy__(self, memo: dict[int, Any]) -> "Noise":
        # A deep copy of a wrapper draws its own noise.
        other = copy.copy(self)
        other._number = next(_created)
        if self._stream is not None:
            other._stream = SeedStream(derive(self._stream.state()["base"], other._number))
        return other


def replica_group(root: nn.Module) -> tuple[int, ...]:
    """Returns the ranks of the processes that hold copies of this process's activations.

    The result is empty if no other process holds copies.

    NOTE [ Replicas draw the same noise ]
    1. Processes that see different data draw different noise, so that their errors average out.
    2. The processes of a tensor-parallel group hold copies of some activations. They also hold copies of
       parameters (norms, biases) whose gradients nobody reduces. With different noise in each process,
       these copies would drift apart. So all processes of the group take the rank of the first one.
    3. The group is that of the mesh of a DTensor parameter. FSDP2 gathers the parameters that it shards
       before they are used. For these parameters, only the mesh without FSDP's dimensions counts. FSDP's
       dimensions come first.

    Warns if parameters live on several meshes.
    """
    # Anyone holding a DTensor has already imported the module; others need no walk over all parameters.
    if "torch.distributed.tensor" not in sys.modules or not dist.is_initialized():
        return ()
    groups = set(_groups(root))
    if len(groups) > 1:
        warnings.warn(_AMBIGUOUS, stacklevel=8)
    return groups.pop() if len(groups) == 1 else ()


def _groups(root: nn.Module) -> Iterator[tuple[int, ...]]:
    sharded = _sharded_by_fsdp(root)
    for parameter in root.parameters():
        if is_dtensor(parameter):
            mesh: Any = parameter.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
            skipped = _fsdp_dims(parameter) if id(parameter) in sharded else 0
            coordinate = mesh.get_coordinate()
            if skipped < mesh.ndim and coordinate is not None:
                yield tuple(mesh.mesh[tuple(coordinate[:skipped])].flatten().tolist())


def _sharded_by_fsdp(root: nn.Module) -> set[int]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return set()
    modules = (m for m in all_modules(root) if isinstance(m, fsdp.FSDPModule))
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _fsdp_dims(parameter: Any) -> int:
    """Counts the leading mesh dimensions of FSDP: any number of replicas, then its shards."""
    for dim, placement in enumerate(parameter.placements):
        if not placement.is_replicate():
            return dim + 1
    return len(parameter.placements)
