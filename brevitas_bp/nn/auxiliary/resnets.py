"""The runs of a ResNet with blocks like those of torchvision and timm."""

from collections.abc import Iterator
from typing import Any

from torch import nn

_WHERE = "brevitas_bp.nn.resnet_runs"


def resnet_runs(network: nn.Module, blocks_per_run: int | None = 2) -> list[list[str]]:
    """Returns the runs of a residual network: lists of names of blocks that share an auxiliary tensor.

    A block is a module with convolutions ``conv1`` and ``conv2`` and an attribute ``downsample``, as
    ``BasicBlock`` and ``Bottleneck`` of torchvision and timm. Blocks with pre-activation do not count:
    their convolutions do not read the input of the block. Blocks must run in the order in which the
    network lists them. A block with ``downsample`` changes the shape, so it is the last of its run. It
    still reads an input of the old shape, so a run may go on into the next stage: ResNet-18 gives runs
    of at most 3, 2, 2 and 1 blocks.

    Args:
        network: the network.
        blocks_per_run: most blocks of a run; None: no limit. With fewer blocks, the auxiliary
            activation is closer to the inputs that it stands for, and more of them are stored. Runs of 1
            block are exact.

    Raises:
        ValueError: ``blocks_per_run`` is below 1, or the network has no such block.

    >>> class Block(nn.Module):
    ...     def __init__(self, downsample=None):
    ...         super().__init__()
    ...         self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    ...         self.downsample = downsample
    >>> resnet_runs(nn.Sequential(Block(), Block(), Block(nn.Identity()), Block()), None)
    [['0', '1', '2'], ['3']]
    """
    if blocks_per_run is not None and not (isinstance(blocks_per_run, int) and blocks_per_run >= 1):
        raise ValueError(
            f"{_WHERE}: blocks_per_run must be a whole number >= 1 or None, got {blocks_per_run!r}")
    runs: list[list[str]] = [[]]
    for name, block in network.named_modules():
        if _is_block(block):
            if blocks_per_run is not None and len(runs[-1]) >= blocks_per_run:
                runs.append([])
            runs[-1].append(name)
            if getattr(block, "downsample", None) is not None:
                runs.append([])
    found = [run for run in runs if run]
    if not found:
        raise ValueError(
            f"{_WHERE}: {type(network).__name__} has no block that begins with conv1, a convolution "
            "that reads the input of its block, and has conv2 and downsample; describe the runs "
            "yourself, as lists of block names in the order in which they run")
    return found


def input_layers(block: nn.Module) -> Iterator[nn.Module]:
    """Yields the layers of a ResNet's block that read the input of the block itself.

    These are ``conv1``, and the convolution of the shortcut unless something pools before it.
    """
    # A block is any module with these attributes.
    yield block.conv1  # pyright: ignore[reportReturnType]
    shortcut: Any = getattr(block, "downsample", None)
    if shortcut is None:
        return
    first = next((m for m in shortcut.children() if not isinstance(m, nn.Identity)), shortcut)
    if isinstance(first, nn.Conv2d):
        yield first


def _is_block(module: nn.Module) -> bool:
    if not hasattr(module, "downsample") or not all(
            isinstance(getattr(module, name, None), nn.Conv2d) for name in ("conv1", "conv2")):
        return False
    # Blocks with pre-activation normalize first, and conv1 does not read their input.
    parts = [name for name, _ in module.named_children() if name != "downsample"]
    return not any("norm" in type(getattr(module, name)).__name__.lower()
                   for name in parts[:parts.index("conv1")])
