"""Operations of torch whose output is their argument in another shape, place or dtype.

We recognise parameters behind these operations, and follow roundings through them. In a compiled graph,
these operations move together with the operation that reads their output. The names are those of aten.
Autograd's node has the same name in CamelCase.
"""

from collections.abc import Iterable, Iterator, Set
from typing import Any

from torch import Tensor

#: Views of all elements, in another shape or order.
VIEWS = frozenset({
    "view", "reshape", "_unsafe_view", "_reshape_alias", "permute", "transpose", "t", "movedim",
    "swapaxes", "squeeze", "unsqueeze", "unflatten", "alias", "detach"})
#: Views and copies of all elements.
WHOLE = VIEWS | {"clone", "contiguous"}
#: Views of some elements, or of one element several times.
PIECES = frozenset({
    "as_strided", "chunk", "diagonal", "expand", "narrow", "select", "slice", "split",
    "split_with_sizes", "unbind", "unfold", "unsafe_split"})
#: The same elements in another dtype.
CASTS = frozenset({"to", "_to_copy", "convert_element_type"})
_MOST = 16


def node_name(operation: str) -> str:
    """Returns the name of autograd's node, without "Backward" and its number.

    >>> [node_name(name) for name in ("t", "_unsafe_view", "split_with_sizes")]
    ['T', 'UnsafeView', 'SplitWithSizes']
    """
    return "".join(word.capitalize() for word in operation.split("_"))


def kind_of(node: Any) -> str:
    """Returns the operation of a node of autograd's graph, as :func:`node_name` does."""
    return node.name().rstrip("0123456789").removesuffix("Backward")


def node_names(operations: Iterable[str]) -> frozenset[str]:
    """Returns the names of the nodes of operations."""
    return frozenset(node_name(operation) for operation in operations)


#: Nodes of views of all or some elements.
VIEW_NODES = node_names(WHOLE | PIECES)
#: Nodes of casts.
CAST_NODES = node_names(CASTS)
#: Nodes of views, copies and casts of all elements in their order.
IN_ORDER_NODES = CAST_NODES | node_names((
    "view", "reshape", "_unsafe_view", "_reshape_alias", "alias", "clone", "contiguous", "squeeze",
    "unsqueeze", "unflatten"))


def nodes_behind(x: Tensor, kinds: Set[str]) -> Iterator[tuple[Any, int]]:
    """Yields the node that made ``x`` and those before it, each with the number of its output.

    It goes on through nodes of these kinds. The last node is of another kind, unless there are too many.
    """
    node, output = x.grad_fn, x.output_nr
    for _ in range(_MOST):
        if node is None:
            return
        yield node, output
        if kind_of(node) not in kinds:
            return
        node, output = node.next_functions[0]


def comes_from(x: Tensor, original: Tensor, kinds: Set[str]) -> bool:
    """Whether, in autograd's graph, only nodes of these kinds lead from ``original`` to ``x``."""
    made = original.grad_fn
    for node, output in nodes_behind(x, kinds):
        if node is made and output == original.output_nr:
            return True
        if made is None and node.name().endswith("AccumulateGrad"):
            return node.variable is original
    return False
