"""Recognises parameters and buffers among saved tensors, in whatever disguise."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.parameter import is_lazy

from brevitas_bp.backward.saved import is_parameter, own_shape, storage_id, tensors_in
from brevitas_bp.backward.views import CASTS, PIECES, WHOLE, node_name
from brevitas_bp.codec.shard import is_dtensor, is_storable

# Backward nodes of operations whose output is the parameter itself in another shape or dtype.
_DISGUISES = frozenset(node_name(operation) for operation in WHOLE | PIECES | CASTS)
_MAX_DISGUISES = 16
# Where replicas of nn.DataParallel have their copies of parameters.
_OF_REPLICAS = "_former_parameters"


def _tensors(root: nn.Module, modules: Iterable[nn.Module] | None) -> Iterable[Tensor]:
    """Parameters and buffers, from the modules where these were collected already."""
    if modules is None or any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        return (*root.parameters(), *root.buffers())
    return [
        tensor for module in modules
        for table in (module._parameters, module._buffers, module.__dict__.get(_OF_REPLICAS, {}))
        for tensor in table.values() if tensor is not None]


class ParameterSet:
    """The parameters and buffers of a module, by storage.

    Collected for one forward pass, so that parameters which were replaced, tied or moved since are
    found. Where they are DTensors, FSDP2 may gather them during the pass, into other tensors: then they
    are looked up once more.
    """

    def __init__(self, root: nn.Module, modules: Iterable[nn.Module] | None = None) -> None:
        self._storages: set[int] = set()
        self._frozen: set[int] = set()
        self._gathered: nn.Module | None = None
        for tensor in _tensors(root, modules):
            ordinary = type(tensor) in (Tensor, nn.Parameter)
            if not ordinary and is_lazy(tensor):
                continue
            storage = storage_id(tensor)
            self._storages.add(storage)
            if not ordinary and is_dtensor(tensor):
                self._gathered = root
            # A buffer [C] is a statistic: the one of this batch has its shape and is no copy of it.
            statistic = tensor.dim() < 2 and not isinstance(tensor, nn.Parameter)
            if tensor.is_floating_point() and not (tensor.requires_grad or statistic):
                self._frozen.add(storage)

    def contains(self, x: Tensor, arguments: tuple[Any, ...] = ()) -> bool:
        """Whether ``x`` is, or is_view_or_cast_of, a parameter or buffer.

        A parameter of another module (tied weights passed as an argument) is one too.

        Args:
            x: a saved tensor.
            arguments: of the operation that saves it.
        """
        return (
            is_parameter(x) or storage_id(x) in self._storages or self._derives_from_parameter(x)
            or (self._gathered is not None and self._is_gathered_frozen(x))
            or (bool(self._frozen) and self._is_cast_of_frozen(x, arguments)))

    def _derives_from_parameter(self, x: Tensor) -> bool:
        node = x.grad_fn
        # A leaf shows itself; and most of what is saved was computed.
        if node is None or _makes_new(node):
            return False
        leaf = leaf_behind(x)
        return leaf is not None and (
            is_parameter(leaf) or storage_id(leaf) in self._storages)

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
        if x.requires_grad or not (is_storable(x) and x.is_floating_point()):
            return False
        shape = own_shape(x)
        return any(
            a.dtype != x.dtype and _is_piece(shape, own_shape(a)) and self._is_frozen(a)
            for a in tensors_in(arguments) if is_storable(a))

    def _is_frozen(self, x: Tensor) -> bool:
        return storage_id(x) in self._frozen or self._is_gathered_frozen(x)


def leaf_behind(x: Tensor) -> Tensor | None:
    """The leaf that ``x`` is, or shows in another shape or dtype; None for what was computed."""
    if x.is_leaf:
        return x
    for node, _ in _origins(x):
        if node.name().endswith("AccumulateGrad"):
            return node.variable
    return None


def is_view_or_cast_of(x: Tensor, original: Tensor) -> bool:
    """Whether autograd saw ``x`` be made of ``original`` by casts and views alone."""
    made = original.grad_fn
    for node, output in _origins(x):
        if node is made and output == original.output_nr:
            return True
        if made is None and node.name().endswith("AccumulateGrad"):
            return node.variable is original
    return False


def _origins(x: Tensor) -> Iterator[tuple[Any, int]]:
    """The node that made ``x``, and those before it up to one that made something new."""
    node, output = x.grad_fn, x.output_nr
    for _ in range(_MAX_DISGUISES):
        if node is None:
            return
        yield node, output
        if _makes_new(node):
            return
        node, output = node.next_functions[0]


# Class of a node -> whether it makes something new; of torch's own, each of which is one operation.
_new: dict[type, bool] = {}


def _makes_new(node: Any) -> bool:
    """Whether the output of a node is not its input in another shape or dtype."""
    kind = type(node)
    found = _new.get(kind)
    if found is None:
        name: str = node.name()
        found = name.rstrip("0123456789").removesuffix("Backward") not in _DISGUISES
        # Classes of Python functions may hold tensors, and would never go.
        if kind.__name__ == name and not issubclass(kind, BackwardCFunction):
            _new[kind] = found
    return found


def _is_piece(shape: list[int], whole: list[int]) -> bool:
    """Whether ``shape`` can be all of ``whole`` or a chunk of it along one dimension."""
    return len(shape) == len(whole) and sum(a != b for a, b in zip(shape, whole)) <= 1 and all(
        a <= b for a, b in zip(shape, whole))
