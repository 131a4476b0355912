"""Which processes draw the same noise."""

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn

from brevitas_bp.backward.transparent import all_modules
from brevitas_bp.codec.shard import is_dtensor

_AMBIGUOUS = (
    "brevitas_bp.QuantBackwardWrapper: the parameters are DTensors on several device meshes, so it is "
    "not known which processes hold copies of the same activations and must draw the same noise; each "
    "draws its own. Pass rank=, the rank of the data-parallel dimension")


def noise_rank(group: tuple[int, ...]) -> int:
    """The number that tells this process's noise from that of others.

    Asked at every forward pass: the wrapper may be older than the process group.

    Args:
        group: processes that share it, or none.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    return group[0] if group else dist.get_rank()


def replica_group(root: nn.Module) -> tuple[int, ...]:
    """Ranks of the processes that hold copies of the activations of this one; none if it is alone.

    NOTE [ Replicas draw the same noise ]
    1. Processes that see other data draw other noise: their errors average out.
    2. The processes of a tensor-parallel group hold copies of some activations, and of parameters
       (norms, biases) whose gradients nobody reduces: with noise of their own the copies drift apart.
       So all of them take the rank of the first.
    3. The group is that of the mesh of a DTensor parameter. Those that FSDP2 shards it gathers before
       they are used: what counts is their mesh without FSDP's dimensions, which come first.

    Warns where parameters live on several meshes.
    """
    # Who has a DTensor has imported them: others are spared a walk over all parameters.
    if "torch.distributed.tensor" not in sys.modules or not dist.is_initialized():
        return ()
    groups = set(_groups(root))
    if len(groups) > 1:
        warnings.warn(_AMBIGUOUS, stacklevel=7)
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
    """Leading dimensions of the mesh that are FSDP's: any number of replicas, then its shards."""
    for dim, placement in enumerate(parameter.placements):
        if not placement.is_replicate():
            return dim + 1
    return len(parameter.placements)
