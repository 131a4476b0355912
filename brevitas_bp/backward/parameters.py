"""Recognises parameters and buffers among saved tensors, even as views, casts or copies."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.parameter import is_lazy

from brevitas_bp.backward.saved import is_parameter, own_shape, storage_id, tensors_in
from brevitas_bp.backward.views import CAST_NODES, VIEW_NODES, comes_from, kind_of, nodes_behind
from brevitas_bp.codec.shard import is_dtensor, is_storable

# Names of backward nodes whose output is the parameter itself in another shape or dtype.
_DISGUISES = VIEW_NODES | CAST_NODES
# Such as the scale ``1 + weight`` of a norm.
_ELEMENTWISE = _DISGUISES | {
    "Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Exp", "Log", "Softplus", "Sigmoid", "Tanh", "Abs", "Pow",
    "Sqrt", "Rsqrt", "Reciprocal", "Clamp", "ClampMin", "ClampMax"}
_MAX_STEPS = 8
# The attribute in which replicas of nn.DataParallel keep their copies of parameters.
_OF_REPLICAS = "_former_parameters"


def _tensors(root: nn.Module, modules: Iterable[nn.Module] | None) -> Iterable[Tensor]:
    """Returns parameters and buffers, read from ``modules`` if these were collected already."""
    if modules is None or any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        return (*root.parameters(), *root.buffers())
    return [
        tensor for module in modules
        for table in (module._parameters, module._buffers, module.__dict__.get(_OF_REPLICAS, {}))
        for tensor in table.values() if tensor is not None]


class ParameterSet:
    """The parameters and buffers of a module, identified by their storage.

    The set is collected anew for each forward pass, so that it has parameters which were replaced, tied
    or moved since. If parameters are DTensors, FSDP2 may gather them into other tensors during the pass.
    Such parameters are looked up once more.
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
            # A buffer [C] is a statistic: the statistic of this batch has its shape, but is no copy.
            statistic = tensor.dim() < 2 and not isinstance(tensor, nn.Parameter)
            if tensor.is_floating_point() and not (tensor.requires_grad or statistic):
                self._frozen.add(storage)

    @property
    def gathered(self) -> bool:
        """Whether parameters are DTensors, which FSDP2 may gather and free during a pass."""
        return self._gathered is not None

    def contains(self, x: Tensor, arguments: tuple[Any, ...] = ()) -> bool:
        """Whether ``x`` is a parameter or buffer, or a view or cast of one.

        A parameter of another module counts too (tied weights passed as an argument).

        Args:
            x: a saved tensor.
            arguments: arguments of the operation that saves ``x``.
        """
        return (
            is_parameter(x) or storage_id(x) in self._storages or self._derives_from_parameter(x)
            or (self._gathered is not None and self._is_gathered_frozen(x))
            or (bool(self._frozen) and self._is_cast_of_frozen(x, arguments)))

    def _derives_from_parameter(self, x: Tensor) -> bool:
        node = x.grad_fn
        # A leaf needs no search, and most other saved tensors were computed.
        if node is None or _makes_new(node):
            return False
        leaf = leaf_behind(x)
        return leaf is not None and (
            is_parameter(leaf) or storage_id(leaf) in self._storages)

    def _is_gathered_frozen(self, x: Tensor) -> bool:
        """Whether ``x`` has the storage of a frozen parameter that FSDP2 has gathered.

        Views and casts of such a parameter show no history.
        """
        if self._gathered is None or x.requires_grad:
            return False
        storage = storage_id(x)
        return any(
            storage_id(p) == storage for p in self._gathered.parameters() if not is_lazy(p))

    def _is_cast_of_frozen(self, x: Tensor, arguments: tuple[Any, ...]) -> bool:
        """Whether ``x`` is an autocast copy of a frozen parameter, with a new storage and no history.

        PyTorch reports autocast as off while it casts, so the shapes of the arguments have to tell.
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
    """Returns the leaf that ``x`` is or shows in another shape or dtype; None if ``x`` was computed."""
    if x.is_leaf:
        return x
    for node, _ in nodes_behind(x, _DISGUISES):
        if node.name().endswith("AccumulateGrad"):
            return node.variable
    return None


def is_view_or_cast_of(x: Tensor, original: Tensor) -> bool:
    """Whether, in the autograd graph, only casts and views lead from ``original`` to ``x``."""
    return comes_from(x, original, _DISGUISES)


def is_function_of_parameter(x: Tensor) -> bool:
    """Whether ``x`` is a parameter, or was computed from one element by element, in few steps."""
    if is_parameter(x):
        return True
    node: Any = x.grad_fn
    for _ in range(_MAX_STEPS):
        if node is None:
            return False
        if node.name().endswith("AccumulateGrad"):
            return is_parameter(node.variable) and node.variable.numel() == x.numel()
        sources = [source for source, _ in node.next_functions if source is not None]
        if len(sources) != 1 or kind_of(node) not in _ELEMENTWISE:
            return False
        node = sources[0]
    return False


# Class of a node -> whether it makes something new. Only for torch's own classes, which stand for one
# operation each.
_new: dict[type, bool] = {}


def _makes_new(node: Any) -> bool:
    """Whether a node's output is more than the node's input in another shape or dtype."""
    kind = type(node)
    found = _new.get(kind)
    if found is None:
        found = kind_of(node) not in _DISGUISES
        # Classes of Python Functions may hold tensors, and the table would keep them alive forever.
        if kind.__name__ == node.name() and not issubclass(kind, BackwardCFunction):
            _new[kind] = found
    return found


def _is_piece(shape: list[int], whole: list[int]) -> bool:
    """Whether ``shape`` can be all of ``whole`` or a chunk of it along one dimension."""
    return len(shape) == len(whole) and sum(a != b for a, b in zip(shape, whole)) <= 1 and all(
        a <= b for a, b in zip(shape, whole))
