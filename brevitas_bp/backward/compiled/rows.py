"""Rows and channels of a tensor that a compiled graph saves, read from its graphs.

See NOTE [ Rows ] in :mod:`brevitas_bp.codec.rows`. :mod:`brevitas_bp.backward.rows` finds rows and
channels of operations that run outside compiled graphs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from brevitas_bp.backward.compiled.nodes import elements_of, is_reshape, name_of
from brevitas_bp.backward.rows import LEAST_PLANE, LEAST_ROW
from brevitas_bp.backward.views import CASTS


@dataclass(frozen=True)
class Grouping:
    """How buckets follow the use that backward makes of a tensor [N, C, ...].

    Attributes:
        row: elements of a row, consecutive in the order of dimensions; None: no rows.
        in_memory: rows are whole samples, whatever the memory order of their dimensions.
        channels: values are stored in units of their channel, dimension 1.
    """

    row: int | None = None
    in_memory: bool = False
    channels: bool = False


def grouping_of(node: Node, backward: Graph, x: Tensor) -> Grouping:
    """Returns how the buckets of a saved tensor follow its rows and channels.

    Args:
        node: the node of the forward graph that made the tensor.
        backward: the backward graph.
        x: a fake tensor like the saved one.
    """
    if x.dim() < 2:
        return Grouping()
    for seen, user in _users(node):
        if name_of(user) == "var_mean":
            return _of_statistic(x, seen, user)
        if name_of(user).endswith("norm") or "batch_norm" in name_of(user):
            return _of_norm(x, user)
    groups = [
        user.args[9] for start in _named(backward, node.name) for _, user in _users(start)
        if name_of(user) == "convolution_backward"]
    if groups:
        return _of_convolution(x, max(g for g in groups if isinstance(g, int)))
    dims = 1
    while dims < x.dim() - 1 and _size(x.shape[-dims:]) < (
            LEAST_ROW if x.dim() < 4 or x.shape[-1] >= LEAST_ROW else LEAST_PLANE):
        dims += 1
    row = _static(x.shape[-dims:])
    return Grouping(None if row is None or row < LEAST_ROW else row)


def is_small_input(node: Node, inputs: list[Node], backward: Graph) -> bool:
    """Whether a layer's input needs no gradient, and has half the elements of the output at most.

    Args:
        node: the node of the forward graph that the layer reads.
        inputs: inputs of the forward graph. The backward graph returns their gradients.
        backward: the backward graph.
    """
    source: Any = node
    while is_reshape(source) or name_of(source) in CASTS:
        source = source.args[0]
    gradients: Any = backward.output_node().args[0]
    if source not in inputs or gradients[inputs.index(source)] is not None:
        return False
    return any(
        name_of(user) in ("convolution_backward", "mm") and elements_of(other) >= 2 * elements_of(start)
        for start in _named(backward, node.name) for seen, user in _users(start)
        for other in user.all_input_nodes[:2] if other is not seen)


def statistics_of(node: Node) -> tuple[Node, Node] | None:
    """Returns variance and mean of a node that a norm in its graph computes, if there is such a norm."""
    for _, user in _users(node):
        if name_of(user) == "var_mean":
            parts = {n.args[1]: n for n in user.users if name_of(n) == "getitem"}
            if 0 in parts and 1 in parts:
                return parts[0], parts[1]
    return None


def _of_statistic(x: Tensor, seen: Node, user: Node) -> Grouping:
    """Returns the grouping for a norm, by the dimensions over which it takes its statistics."""
    value: Any = seen.meta.get("val")
    dims: Any = user.args[1] if len(user.args) > 1 else None
    if not isinstance(value, Tensor) or not isinstance(dims, (list, tuple)):
        return Grouping(channels=x.dim() > 2)
    reduced = {d % value.dim() for d in dims}
    if reduced == set(range(value.dim() - len(reduced), value.dim())):
        return Grouping(_static(value.shape[-len(reduced):]))
    return Grouping(channels=value.dim() == x.dim() and 1 not in reduced)


def _of_norm(x: Tensor, user: Node) -> Grouping:
    """Returns the grouping for a norm that was not decomposed, by its name and arguments."""
    if "layer_norm" in name_of(user):
        shape: Any = user.args[1]
        return Grouping(_static(x.shape[-len(shape):]))
    if "group_norm" in name_of(user):
        groups: Any = user.args[6]
        sample = _static(x.shape[1:])
        return Grouping(None if sample is None else sample // groups)
    return Grouping(channels="batch_norm" in name_of(user))


def _of_convolution(x: Tensor, groups: int) -> Grouping:
    if x.dim() < 3:
        return Grouping()
    return Grouping(_static(x.shape[1:]), in_memory=True, channels=groups > 1)


def _users(node: Node) -> Iterator[tuple[Node, Node]]:
    """Yields (node that is read, its reader) for a node, directly or through views and casts."""
    waiting = [node]
    while waiting:
        current = waiting.pop()
        for user in current.users:
            yield current, user
            if is_reshape(user) or name_of(user) in CASTS:
                waiting.append(user)


def _named(graph: Graph, name: str) -> list[Node]:
    return [n for n in graph.find_nodes(op="placeholder") if n.name == name]


def _static(sizes: Any) -> int | None:
    """Returns the product of sizes that are numbers; None if one is symbolic or zero."""
    return prod(sizes) if all(isinstance(size, int) for size in sizes) and 0 not in sizes else None


def _size(sizes: Any) -> float:
    found = _static(sizes)
    return float("inf") if found is None else found
