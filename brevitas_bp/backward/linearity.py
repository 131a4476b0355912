"""What a compiled backward graph does with a saved tensor: is the gradient linear in it?

A compiled graph has no operations of the user any more, and its backward runs parts of the forward
again. But it can be read: a rounding without bias leaves a gradient without bias where all that backward
computes of the tensor is linear in it. The rules below follow the tensor through the graph.

NOTE [ Reading a backward graph ]
1. Each value has a :class:`Trace` for the saved tensor: how it depends on it. Values that do not are
   constants, whatever they are.
2. Linear maps (views, sums, casts, products with constants) keep the trace. Anything unknown makes it
   nonlinear: a missing rule costs bytes, never a bias.
3. A product of two values that both depend is nonlinear, but for norms: there one of the factors is a
   mean over so many elements that the rounding of any one hardly shows (Chen et al., "ActNN", 2021).
4. Once the gradient that comes in is a factor, another matrix product or convolution carries the
   rounding into gradients further up.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Graph, Node

from brevitas_bp.backward.saved import Reach

# Elements of a sum from which a product with one of them is taken for that of independent factors.
_MANY = 32


@dataclass(frozen=True)
class Trace:
    """How a value of the graph depends on one saved tensor.

    Attributes:
        linear: the value is linear in it.
        norm: or nearly so, by the backward of a norm.
        summed: over many elements.
        carries: the gradient that comes in is already a factor.
        passes: the rounding goes on to gradients further up.
    """

    linear: bool = True
    norm: bool = False
    summed: bool = False
    carries: bool = False
    passes: bool = False

    @property
    def reach(self) -> Reach:
        if not self.linear:
            return "nonlinear"
        if self.norm:
            return "norm"
        return "all" if self.passes else "weight"


_NONLINEAR = Trace(linear=False)


def _join(first: Trace | None, second: Trace | None) -> Trace | None:
    """The trace of a sum, or of a tensor that has elements of both."""
    if first is None or second is None:
        return first or second
    return Trace(
        first.linear and second.linear, first.norm or second.norm, first.summed and second.summed,
        first.carries or second.carries, first.passes or second.passes)


class _Reader:
    """Follows one saved tensor through a backward graph.

    Args:
        graph: the backward graph.
        tangential: nodes that depend on the gradients that come in.
    """

    def __init__(self, graph: Graph, tangential: set[Node]) -> None:
        self.graph = graph
        self.tangential = tangential
        self.traces: dict[Node, Trace] = {}
        # Of operations with several outputs: output -> trace.
        self.outputs: dict[Node, Mapping[int, Trace]] = {}

    def reach(self, saved: Node) -> Reach:
        """The farthest reach of ``saved`` over all that the graph returns."""
        self.traces[saved] = Trace()
        result: Trace | None = None
        for node in self.graph.nodes:
            if node.op == "output":
                for returned in node.all_input_nodes:
                    result = _join(result, self.traces.get(returned))
            elif node.op == "call_function" and any(
                    n in self.traces or n in self.outputs for n in node.all_input_nodes):
                self._visit(node)
        return "weight" if result is None else result.reach

    def _visit(self, node: Node) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, Node) and isinstance(index, int)
            trace = self.outputs.get(source, {}).get(index) if source in self.outputs else (
                self.traces.get(source))
            if trace is not None:
                self.traces[node] = trace
            return
        name = _name_of(node)
        if name == "convolution_backward":
            self.outputs[node] = self._convolution_backward(node)
            return
        rule = _RULES.get(name)
        self.traces[node] = _NONLINEAR if rule is None else rule(self, node)

    def trace(self, argument: Any) -> Trace | None:
        """How an argument depends on the tensor; None: not at all."""
        if isinstance(argument, (list, tuple)):
            result: Trace | None = None
            for part in argument:
                result = _join(result, self.trace(part))
            return result
        return self.traces.get(argument) if isinstance(argument, Node) else None

    def multiplied(self, node: Node, a: Any, b: Any, *, heavy: bool) -> Trace | None:
        """The trace of a product of two arguments; ``heavy``: a matrix product or a convolution."""
        first, second = self.trace(a), self.trace(b)
        if first is not None and second is not None:
            # NOTE [ Reading a backward graph ], rule 3.
            if _belongs_to_norm(node) and (first.summed or second.summed) and not heavy:
                joined = _join(first, second)
                assert joined is not None
                return replace(joined, norm=True, summed=False)
            return _NONLINEAR
        trace = first or second
        if trace is None:
            return None
        other = b if second is None else a
        if heavy and trace.carries:
            return replace(trace, passes=True)
        return replace(trace, carries=trace.carries or other in self.tangential)

    def _convolution_backward(self, node: Node) -> dict[int, Trace]:
        gradient, x, weight = node.args[:3]
        found = {
            0: self.multiplied(node, gradient, weight, heavy=True),
            1: self.multiplied(node, gradient, x, heavy=True), 2: self.trace(gradient)}
        return {output: trace for output, trace in found.items() if trace is not None}


_Rule = Callable[[_Reader, Node], Trace]
_RULES: dict[str, _Rule] = {}


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    def add(function: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return add


def _depends(reader: _Reader, arguments: Any) -> bool:
    return reader.trace(list(arguments)) is not None


@_rule(
    "view", "reshape", "_unsafe_view", "permute", "transpose", "t", "expand", "squeeze", "unsqueeze",
    "slice", "select", "clone", "alias", "detach", "contiguous", "convert_element_type", "_to_copy",
    "to", "neg", "constant_pad_nd", "flip", "roll", "repeat", "as_strided", "unbind", "split",
    "split_with_sizes", "gather", "index_select", "slice_backward", "select_backward",
    "avg_pool2d", "_adaptive_avg_pool2d", "upsample_nearest2d", "device_put", "unfold",
    "diagonal", "view_as_real", "view_as_complex", "real", "cumsum", "lift_fresh_copy")
def _linear_in_first(reader: _Reader, node: Node) -> Trace:
    trace = reader.trace(node.args[0])
    if trace is None or _depends(reader, [*node.args[1:], *node.kwargs.values()]):
        return _NONLINEAR
    return trace


@_rule("cat", "stack", "add", "sub", "rsub", "slice_scatter", "select_scatter")
def _linear_in_all(reader: _Reader, node: Node) -> Trace:
    return reader.trace(node.args) or _NONLINEAR


@_rule("index")
def _index(reader: _Reader, node: Node) -> Trace:
    return _linear_in_first(reader, node)


@_rule("where")
def _where(reader: _Reader, node: Node) -> Trace:
    trace = reader.trace(node.args[1:])
    return _NONLINEAR if trace is None or _depends(reader, node.args[:1]) else trace


@_rule("sum", "mean")
def _sum(reader: _Reader, node: Node) -> Trace:
    trace = _linear_in_first(reader, node)
    source = node.args[0]
    assert isinstance(source, Node)
    terms = _elements(source) / max(_elements(node), 1)
    return replace(trace, summed=trace.summed or terms >= _MANY)


@_rule("mul")
def _mul(reader: _Reader, node: Node) -> Trace:
    return reader.multiplied(node, node.args[0], node.args[1], heavy=False) or _NONLINEAR


@_rule("div")
def _div(reader: _Reader, node: Node) -> Trace:
    if _depends(reader, node.args[1:]) or "rounding_mode" in node.kwargs:
        return _NONLINEAR
    return _mul(reader, node)


@_rule("mm", "bmm", "mv", "dot", "matmul", "convolution")
def _matrix_product(reader: _Reader, node: Node) -> Trace:
    return reader.multiplied(node, node.args[0], node.args[1], heavy=True) or _NONLINEAR


@_rule("addmm", "baddbmm")
def _added_product(reader: _Reader, node: Node) -> Trace:
    product = reader.multiplied(node, node.args[1], node.args[2], heavy=True)
    return _join(reader.trace(node.args[0]), product) or _NONLINEAR


def _name_of(node: Node) -> str:
    """``aten.mul.Tensor`` -> "mul"; "" for what is no operator of aten or prims."""
    namespace = getattr(node.target, "namespace", "")
    return getattr(node.target, "_opname", "") if namespace in ("aten", "prims") else ""


def _belongs_to_norm(node: Node) -> bool:
    return "norm" in str(node.meta.get("original_aten", ""))


def _elements(node: Node) -> float:
    """Elements of a node's value; a symbolic size counts as it was when the graph was made."""
    value = node.meta.get("val")
    numel = getattr(value, "numel", None)
    if numel is None:
        return 1
    count = numel()
    return count if isinstance(count, int) else getattr(count.node, "hint", None) or 1


def is_tangent(placeholder: Node) -> bool:
    """Whether an input of a backward graph is a gradient that comes in."""
    return placeholder.name.startswith("tangents")


def tangential_nodes(graph: Graph) -> set[Node]:
    """Nodes that depend on the gradients that come into a backward graph."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if is_tangent(node):
                found.add(node)
        elif any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def reach_of(graph: Graph, name: str) -> Reach:
    """How far a rounding of the saved tensor ``name`` goes in a backward graph of ``torch.compile``.

    Args:
        graph: the backward graph, in operators of aten.
        name: of one of its placeholders.
    """
    saved = next(n for n in graph.nodes if n.op == "placeholder" and n.name == name)
    return _Reader(graph, tangential_nodes(graph)).reach(saved)


def inputs_of(node: Node) -> Iterator[Node]:
    """The placeholders that a node is computed from."""
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        if current.op == "placeholder":
            yield current
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                waiting.append(source)
