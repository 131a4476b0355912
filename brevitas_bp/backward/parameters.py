"""Recognises parameters and buffers among saved tensors, in whatever disguise."""

from typing import Any

import torch
from torch import Tensor, nn

# Backward nodes of operations whose output is the parameter itself in another shape or dtype.
_DISGUISES = frozenset({
    "Alias", "AsStrided", "Clone", "Contiguous", "Diagonal", "Expand", "Movedim", "Narrow", "Permute",
    "ReshapeAlias", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "Swapaxes", "T", "ToCopy",
    "Transpose", "Unbind", "Unflatten", "Unfold", "UnsafeSplit", "UnsafeView", "Unsqueeze", "View",
    "Chunk"})
_MAX_DISGUISES = 16


class ParameterSet:
    """The parameters and buffers of a module, by storage.

    Collected for one forward pass, so that parameters which were replaced, tied or moved since are
    found.
    """

    def __init__(self, root: nn.Module) -> None:
        self._storages: set[int] = set()
        self._frozen: list[Tensor] = []
        for tensor in (*root.parameters(), *root.buffers()):
            self._storages.add(storage_id(tensor))
            if not tensor.requires_grad and tensor.is_floating_point():
                self._frozen.append(tensor)

    def contains(self, x: Tensor, arguments: tuple[Any, ...] = ()) -> bool:
        """Whether ``x`` is, or shows, a parameter or buffer.

        Args:
            x: a saved tensor.
            arguments: of the operation that saves it.
        """
        return storage_id(x) in self._storages or self._derives_from_parameter(
            x) or self._is_cast_of_frozen(x, arguments)

    def _derives_from_parameter(self, x: Tensor) -> bool:
        node = x.grad_fn
        for _ in range(_MAX_DISGUISES):
            if node is None:
                return False
            name = node.name()
            if name.endswith("AccumulateGrad"):
                return storage_id(node.variable) in self._storages  # pyright: ignore[reportAttributeAccessIssue]
            if name.rstrip("0123456789").removesuffix("Backward") not in _DISGUISES:
                return False
            node = node.next_functions[0][0]
        return False

    def _is_cast_of_frozen(self, x: Tensor, arguments: tuple[Any, ...]) -> bool:
        """Autocast copies of frozen parameters have a new storage and no history."""
        if not self._frozen or x.requires_grad or x.dtype not in (torch.float16, torch.bfloat16):
            return False
        if not torch.is_autocast_enabled(x.device.type):
            return False
        candidates = [
            a for a in arguments if isinstance(a, Tensor) and storage_id(a) in self._storages]
        return any(sorted(a.shape) == sorted(x.shape) and a.dtype != x.dtype for a in candidates)


def storage_id(x: Tensor) -> int:
    """Identity of the storage of ``x``, valid while something holds the storage."""
    try:
        return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(x)
