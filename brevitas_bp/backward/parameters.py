"""Recognises parameters and buffers among saved tensors, in whatever disguise."""

from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from brevitas_bp.backward.saved import own_shape, storage_id, tensors_in
from brevitas_bp.codec.shard import is_dtensor, is_storable

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
    found. Where they are DTensors, FSDP2 may gather them during the pass, into other tensors: then they
    are looked up once more.
    """

    def __init__(self, root: nn.Module) -> None:
        self._storages: set[int] = set()
        self._frozen: set[int] = set()
        self._gathered: nn.Module | None = None
        for tensor in (*root.parameters(), *root.buffers()):
            if is_lazy(tensor):
                continue
            self._storages.add(storage_id(tensor))
            if is_dtensor(tensor):
                self._gathered = root
            # A buffer [C] is a statistic: the one of this batch has its shape and is no copy of it.
            statistic = tensor.dim() < 2 and not isinstance(tensor, nn.Parameter)
            if tensor.is_floating_point() and not (tensor.requires_grad or statistic):
                self._frozen.add(storage_id(tensor))

    def contains(self, x: Tensor, arguments: tuple[Any, ...] = ()) -> bool:
        """Whether ``x`` is, or shows, a parameter or buffer.

        A parameter of another module (tied weights passed as an argument) is one too.

        Args:
            x: a saved tensor.
            arguments: of the operation that saves it.
        """
        return (
            isinstance(x, nn.Parameter) or storage_id(x) in self._storages
            or self._derives_from_parameter(x) or self._is_gathered_frozen(x)
            or self._is_cast_of_frozen(x, arguments))

    def _derives_from_parameter(self, x: Tensor) -> bool:
        node = x.grad_fn
        for _ in range(_MAX_DISGUISES):
            if node is None:
                return False
            name = node.name()
            if name.endswith("AccumulateGrad"):
                leaf: Tensor = node.variable  # pyright: ignore[reportAttributeAccessIssue]
                return isinstance(leaf, nn.Parameter) or storage_id(leaf) in self._storages
            if name.rstrip("0123456789").removesuffix("Backward") not in _DISGUISES:
                return False
            node = node.next_functions[0][0]
        return False

    def _is_gathered_frozen(self, x: Tensor) -> bool:
        """What FSDP2 has gathered of frozen parameters shows no history, in views and casts of it."""
        if self._gathered is None or x.requires_grad:
            return False
        storage = storage_id(x)
        return any(
            storage_id(p) == storage for p in self._gathered.parameters() if not is_lazy(p))

    def _is_cast_of_frozen(self, x: Tensor, arguments: tuple[Any, ...]) -> bool:
        """Autocast copies of frozen parameters have a new storage and no history.

        PyTorch says that autocast is off while it casts, so the shapes of the arguments have to tell.
        """
        if not self._frozen or x.requires_grad or not (is_storable(x) and x.is_floating_point()):
            return False
        shape = own_shape(x)
        return any(
            a.dtype != x.dtype and _is_piece(shape, own_shape(a)) and self._is_frozen(a)
            for a in tensors_in(arguments) if is_storable(a))

    def _is_frozen(self, x: Tensor) -> bool:
        return storage_id(x) in self._frozen or self._is_gathered_frozen(x)


def _is_piece(shape: list[int], whole: list[int]) -> bool:
    """Whether ``shape`` can be all of ``whole`` or a chunk of it along one dimension."""
    return len(shape) == len(whole) and sum(a != b for a, b in zip(shape, whole)) <= 1 and all(
        a <= b for a, b in zip(shape, whole))
