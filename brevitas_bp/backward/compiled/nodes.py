"""Facts about nodes of a compiled graph: operators of aten, read from the node alone."""

import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from brevitas_bp.backward.views import WHOLE


def name_of(node: Node) -> str:
    """``aten.mul.Tensor`` -> "mul"; "" for a node that is no operator of aten or prims."""
    if node.target is operator.getitem:
        return "getitem"
    namespace = getattr(node.target, "namespace", "")
    return getattr(node.target, "_opname", "") if namespace in ("aten", "prims") else ""


def gradients_of(node: Node) -> list[int]:
    """Returns the positions of the arguments of aten's backward operators that are gradients."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or "_backward" not in name_of(node):
        return []
    return [
        i for i, argument in enumerate(schema.arguments)
        if argument.name.startswith("grad") and i < len(node.args)]


def is_real(node: Node) -> bool:
    """Whether a node's value can be linear in a tensor.

    Integers cannot, nor can bits viewed as another dtype.
    """
    value = node.meta.get("val")
    if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
        return False
    return not _is_reinterpreted(node)


def _is_reinterpreted(node: Node) -> bool:
    """Whether a node views the bits of its argument as another dtype."""
    return getattr(node.target, "_overloadname", "") == "dtype"


def belongs_to_norm(node: Node) -> bool:
    """Whether a node comes from a norm or its backward, which the graph has decomposed."""
    return "norm" in str(node.meta.get("original_aten", ""))


def elements_of(node: Node) -> float:
    """Returns the number of elements of a node's value.

    A symbolic size counts with its value when the graph was made.
    """
    value = node.meta.get("val")
    numel = getattr(value, "numel", None)
    if numel is None:
        return 1
    count = numel()
    return count if isinstance(count, int) else getattr(count.node, "hint", None) or 1


def is_tangent(placeholder: Node) -> bool:
    """Whether an input of a backward graph is an incoming gradient."""
    return placeholder.name.startswith("tangents")


def tangential_nodes(graph: Graph) -> set[Node]:
    """Returns the nodes that depend on the incoming gradients of a backward graph."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if is_tangent(node):
                found.add(node)
        elif any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def is_rectified(node: Node) -> bool:
    """Whether a node of a forward graph is the output of a ReLU, in any shape."""
    while is_reshape(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    name = name_of(node)
    return name == "relu" or (name == "clamp_min" and is_zero(node.args[1]))


def is_reshape(node: Node) -> bool:
    """Whether a node has all elements of its argument, in another shape or memory."""
    return name_of(node) in WHOLE and not _is_reinterpreted(node)


def is_zero(number: Any) -> bool:
    """Whether an argument of a node is the number 0."""
    return isinstance(number, (int, float)) and number == 0


def inputs_of(node: Node) -> Iterator[Node]:
    """Yields the placeholders that a node is computed from."""
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        if current.op == "placeholder":
            yield current
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                waiting.append(source)
