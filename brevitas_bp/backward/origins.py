"""Finds out whether a tensor was computed from another tensor that is stored rounded.

NOTE [ No two roundings of one tensor are multiplied ]
1. An operation ``f(x, w)`` that saves ``x`` gives ``w`` the gradient ``g x``. If ``w`` was computed from
   ``x``, this gradient goes on through operations that saved ``x`` as well. There it is multiplied by
   ``x`` again. If both use one rounding of ``x``, the mean of the product is wrong: it is the mean of a
   square.
2. So an operation gets its own rounding of ``x`` if the gradient of another argument goes through an
   operation that saved ``x`` rounded. Roundings of other tensors are independent of this rounding.
3. We mark the last node of an operation that saved tensors rounded with the storages of these tensors,
   and with their places (:func:`~brevitas_bp.backward.saved.place_of`).
   The mark is in the node's own metadata, because the Python object of a node comes and goes.
4. Some tensors are computed from one rounding: input and output of a norm, for instance. Their storages
   count as one (:class:`SharedRoundings`).
"""

from collections.abc import Hashable, Set
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from brevitas_bp.backward.saved import storage_id, tensors_in
from brevitas_bp.backward.views import VIEW_NODES, nodes_behind
from brevitas_bp.private import node_number

_MARK = "brevitas_bp: storages of what is saved rounded"
# After this many nodes the search stops, and the tensor counts as computed from any other tensor.
_MOST = 4096


class SharedRoundings:
    """The storages of tensors that are computed from one rounding, in one forward pass."""

    def __init__(self) -> None:
        self._groups: dict[int, set[int]] = {}

    def join(self, *tensors: Tensor) -> None:
        """Notes that tensors are computed from one rounding."""
        joined = set().union(*(self.of(storage_id(x)) for x in tensors))
        self._groups.update(dict.fromkeys(joined, joined))

    def of(self, storage: int) -> set[int]:
        """Returns the storages that share a rounding with this one, and this one itself."""
        return self._groups.get(storage) or {storage}


def note_rounded(output: Any, rounded: set[Hashable]) -> None:
    """Marks the outputs of an operation with the storages and places of what it has saved rounded."""
    for tensor in tensors_in(output if isinstance(output, (tuple, list)) else (output,)):
        # After an in-place operation on a view, the view and its base have different nodes.
        for made in (tensor, tensor._base):
            node: Any = None if made is None else made.grad_fn
            if node is not None:
                node.metadata[_MARK] = rounded


def rounded_by(node: Any, tensor: Hashable) -> bool:
    """Whether the operation of a node has saved a tensor rounded, given by its storage or its place."""
    return tensor in node.metadata.get(_MARK, ())


def first_rounding_of(storage: int, made: Tensor) -> int:
    """Returns the number of the first node that can have saved a tensor rounded.

    It is 0, unless the operation that computed the tensor saved it rounded itself, as ``exp`` does. All
    operations that take the tensor are later then. So few nodes have to be searched, even if a network
    runs step by step and its graph is long.

    Args:
        storage: storage of the tensor.
        made: the tensor, or a view of it.
    """
    for node, _ in nodes_behind(made, VIEW_NODES):
        if rounded_by(node, storage):
            return node_number(node)
    return 0


def leads_to(x: Tensor, number: int, kinds: Set[str] = VIEW_NODES) -> bool:
    """Whether ``x`` is the output of the node with a number, seen through nodes of these kinds."""
    return any(node_number(node) == number for node, _ in nodes_behind(x, kinds))


def goes_through_rounding_of(storage: int, x: Tensor, custom: bool = False, first: int = 0) -> bool:
    """Whether a gradient of ``x`` goes through an operation that saved a tensor rounded.

    Args:
        storage: storage of that tensor.
        x: an argument of an operation.
        first: number of the first node that can have done so (:func:`first_rounding_of`).
        custom: whether a custom autograd Function has saved that tensor. We cannot see when such a
            Function ends, so its nodes have no mark.
    """
    node: Any = x.grad_fn
    if node is None or node_number(node) < first:
        return False
    seen, waiting = {node}, [node]
    while waiting:
        node = waiting.pop()
        if rounded_by(node, storage) or (custom and isinstance(node, BackwardCFunction)):
            return True
        for source, _ in node.next_functions:
            if source is not None and source not in seen and node_number(source) >= first:
                seen.add(source)
                waiting.append(source)
        if len(seen) > _MOST:
            return True
    return False
