"""Operations of torch whose output is their argument in another shape, place or dtype.

We recognise parameters behind these operations, and follow roundings through them. In a compiled graph,
these operations move together with the operation that reads their output. The names are those of aten.
Autograd's node has the same name in CamelCase.
"""

from typing import Any

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


def node_name(operation: str) -> str:
    """Returns the name of autograd's node, without "Backward" and its number.

    >>> [node_name(name) for name in ("t", "_unsafe_view", "split_with_sizes")]
    ['T', 'UnsafeView', 'SplitWithSizes']
    """
    return "".join(word.capitalize() for word in operation.split("_"))


def kind_of(node: Any) -> str:
    """Returns the operation of a node of autograd's graph, as :func:`node_name` does."""
    return node.name().rstrip("0123456789").removesuffix("Backward")
