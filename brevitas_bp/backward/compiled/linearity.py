"""How a compiled backward graph uses a saved tensor: is the gradient linear in it?

A compiled graph no longer has the user's operations, and its backward recomputes parts of the forward
pass. But the graph can be read. An unbiased rounding gives an unbiased gradient if every value that
backward computes from the tensor is linear in it. The rules below follow the tensor through the graph.

NOTE [ Reading a backward graph ]
1. Each value has a :class:`Trace` for the saved tensor, which tells how the value depends on it. Values
   that do not depend on the tensor are constants, whatever they are.
2. Linear maps (views, sums, casts, products with constants) keep the trace. An unknown operation makes
   the value nonlinear: a missing rule costs bytes, never a bias.
3. A product of two values that both depend on the tensor is nonlinear. Norms are the exception: there
   one factor is a mean over so many elements that rounding one element hardly changes it (Chen et
   al., "ActNN", 2021).
4. Once the incoming gradient is a factor, another matrix product or convolution carries the rounding
   into gradients further up. So does a value that leaves the graph as the gradient of its input.
5. Every backward operator of aten is linear in the gradients that it takes, whatever its forward is.
6. The attention weights follow from query, key and log-sum-exp. Given them, the backward of attention
   is linear in the value, in the output, and in both together.
7. The backward of a ReLU compares the ReLU's output with 0. The output is also the input of a layer.
   If its sign is kept exactly, these comparisons are constants.
8. The backward of a pooling reads the shape of its input, but none of its values.
"""

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Graph, Node

from brevitas_bp.backward.compiled.nodes import (
    belongs_to_norm,
    elements_of,
    gradients_of,
    is_real,
    is_reshape,
    is_zero,
    name_of,
    tangential_nodes,
)
from brevitas_bp.backward.saved import Reach
from brevitas_bp.backward.views import CASTS, PIECES, WHOLE

# From this many elements on, a sum and one of its elements count as independent factors.
_MANY = 32


@dataclass(frozen=True)
class Trace:
    """How a value of the graph depends on one saved tensor.

    Attributes:
        linear: the value is linear in the tensor.
        norm: the value is nearly linear in the tensor, by the backward of a norm.
        summed: the value is a sum over many elements.
        carries: the incoming gradient is already a factor.
        passes: the rounding reaches gradients further up.
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
    """Returns the trace of a sum, or of a tensor that has elements of both values."""
    if first is None or second is None:
        return first or second
    return Trace(
        first.linear and second.linear, first.norm or second.norm, first.summed and second.summed,
        first.carries or second.carries, first.passes or second.passes)


class _Reader:
    """Follows one saved tensor through a backward graph.

    Args:
        graph: the backward graph.
        tangential: nodes that depend on the incoming gradients.
        last: positions of those returned gradients that no further gradient depends on.
        rectified: the tensor is not negative, and its zeros are kept exactly.
    """

    def __init__(
            self, graph: Graph, tangential: set[Node], last: Collection[int] | None,
            rectified: bool) -> None:
        self.graph = graph
        self.tangential = tangential
        self.last = last
        self.rectified = rectified
        # Nodes that are the tensor itself, in any shape.
        self.same: set[Node] = set()
        self.traces: dict[Node, Trace] = {}
        # Node with several outputs -> output -> trace.
        self.outputs: dict[Node, Mapping[int, Trace]] = {}

    def reach(self, saved: Node) -> Reach | None:
        """Returns the farthest reach of ``saved`` over all gradients of the graph; None: in none."""
        self.traces[saved] = Trace()
        self.same = {saved}
        result: Trace | None = None
        for node in self.graph.nodes:
            if node.op == "output":
                result = self._returned(node.args[0])
            elif any(n in self.traces or n in self.outputs for n in node.all_input_nodes):
                self._visit(node)
        return None if result is None else result.reach

    def _returned(self, gradients: Any) -> Trace | None:
        result: Trace | None = None
        for position, gradient in enumerate(gradients):
            trace = self.trace(gradient)
            if trace is not None and self.last is not None and position not in self.last:
                trace = replace(trace, passes=trace.passes or trace.carries)
            result = _join(result, trace)
        return result

    def _visit(self, node: Node) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, Node) and isinstance(index, int)
            trace = self.outputs.get(source, {}).get(index) if source in self.outputs else (
                self.traces.get(source))
            if trace is not None:
                self.traces[node] = trace
            return
        name = name_of(node)
        if name in _SHAPE_OF_INPUT and self.trace([*node.args[:1], *node.args[2:]]) is None:
            return
        if name in _CONSTANT or (name in _COMPARISONS and self._compares_with_zero(node, 0, 1)):
            return
        if is_reshape(node) and node.args[0] in self.same:
            self.same.add(node)
        if name == "threshold_backward" and self._compares_with_zero(node, 1, 2):
            trace = self.trace(node.args[0])
            if trace is not None:
                self.traces[node] = trace
            return
        if name == "convolution_backward":
            self.outputs[node] = self._convolution_backward(node)
            return
        if name.startswith("_scaled_dot_product") and name.endswith("_backward"):
            self.outputs[node] = self._attention_backward(node)
            return
        norm = self._trace_in_norm(node) if name.endswith("norm_backward") else None
        if norm is not None:
            self.outputs[node] = _norm_backward(norm)
            return
        rule = _RULES.get(name) or (_gradient if gradients_of(node) else None)
        trace = _NONLINEAR if rule is None or not is_real(node) else rule(self, node)
        self.traces[node] = trace

    def trace(self, argument: Any) -> Trace | None:
        """Tells how an argument depends on the tensor; None: not at all."""
        if isinstance(argument, (list, tuple)):
            result: Trace | None = None
            for part in argument:
                result = _join(result, self.trace(part))
            return result
        return self.traces.get(argument) if isinstance(argument, Node) else None

    def multiplied(self, node: Node, a: Any, b: Any, *, heavy: bool) -> Trace | None:
        """Returns the trace of a product of two arguments.

        ``heavy`` means a matrix product or a convolution.
        """
        first, second = self.trace(a), self.trace(b)
        if first is not None and second is not None:
            # NOTE [ Reading a backward graph ], rule 3.
            if belongs_to_norm(node) and (first.summed or second.summed) and not heavy:
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

    def _compares_with_zero(self, node: Node, tensor: int, bound: int) -> bool:
        """Whether a node reads only the sign of the tensor, and that sign is exact."""
        return self.rectified and node.args[tensor] in self.same and is_zero(node.args[bound])

    def _trace_in_norm(self, node: Node) -> Trace | None:
        """Returns the trace of a norm's input; None if other arguments of the norm have a trace."""
        gradient, x, *others = node.args
        others = [gradient, *others, *node.kwargs.values()]
        return self.trace(x) if self.trace(others) is None else None

    def _attention_backward(self, node: Node) -> dict[int, Trace]:
        """Returns the traces of the gradients of query, key, value and mask.

        See NOTE [ Reading a backward graph ], rule 6.
        """
        target: Any = node.target
        given = dict(zip((argument.name for argument in target._schema.arguments), node.args))
        gradient = self.trace([v for k, v in given.items() if k.startswith("grad_out")])
        factor = self.trace([v for k, v in given.items() if k in ("value", "out")])
        others = self.trace([
            *(v for k, v in given.items() if not k.startswith("grad_out") and k not in ("value", "out")),
            *node.kwargs.values()])
        if others is not None or (gradient is not None and factor is not None):
            return dict.fromkeys(range(4), _NONLINEAR)
        if factor is not None:
            # The gradient of the value depends on neither. Products that follow carry the rounding on.
            return dict.fromkeys((0, 1, 3), replace(factor, carries=True))
        return {} if gradient is None else dict.fromkeys(range(4), gradient)

    def _convolution_backward(self, node: Node) -> dict[int, Trace]:
        gradient, x, weight = node.args[:3]
        found = {
            0: self.multiplied(node, gradient, weight, heavy=True),
            1: self.multiplied(node, gradient, x, heavy=True), 2: self.trace(gradient)}
        return {output: trace for output, trace in found.items() if trace is not None}


def _norm_backward(trace: Trace) -> dict[int, Trace]:
    """Returns the traces of the gradients of a norm's input and weight, given the trace of its input."""
    weight = replace(trace, carries=True)
    return {0: replace(weight, norm=True), 1: weight}


#: Operators whose result depends only on the shape of their arguments.
_CONSTANT = frozenset({
    "sym_size", "sym_numel", "sym_stride", "zeros_like", "ones_like", "full_like", "empty_like",
    "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"})
#: Operators that read only the shape of their second argument.
_SHAPE_OF_INPUT = frozenset({
    "max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward", "avg_pool2d_backward",
    "avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward", "adaptive_max_pool3d_backward", "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward"})
_COMPARISONS = frozenset({"le", "gt", "lt", "ge", "eq", "ne"})
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
    *WHOLE, *PIECES, *CASTS, "neg", "constant_pad_nd", "flip", "roll", "repeat", "gather",
    "index_select", "slice_backward", "select_backward", "index", "_unsafe_index", "avg_pool2d",
    "_adaptive_avg_pool2d", "upsample_nearest2d", "device_put", "view_as_real", "view_as_complex",
    "real", "cumsum", "lift_fresh_copy", "tril", "triu", "masked_fill")
def _linear_in_first(reader: _Reader, node: Node) -> Trace:
    trace = reader.trace(node.args[0])
    if trace is None or _depends(reader, [*node.args[1:], *node.kwargs.values()]):
        return _NONLINEAR
    return trace


@_rule("cat", "stack", "add", "sub", "rsub", "slice_scatter", "select_scatter")
def _linear_in_all(reader: _Reader, node: Node) -> Trace:
    return reader.trace(node.args) or _NONLINEAR


@_rule(
    "index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate", "scatter_add", "index_add")
def _written(reader: _Reader, node: Node) -> Trace:
    # The other operators have one more argument before the written values: a mask or a dimension.
    count = 3 if name_of(node) in ("index_put", "_unsafe_index_put") else 4
    target, *where, source = node.args[:count]
    trace = reader.trace([target, source])
    return _NONLINEAR if trace is None or _depends(reader, where) else trace


def _gradient(reader: _Reader, node: Node) -> Trace:
    """Follows NOTE [ Reading a backward graph ], rule 5."""
    gradients = gradients_of(node)
    trace = reader.trace([node.args[i] for i in gradients])
    unread = [*gradients, 1] if name_of(node) in _SHAPE_OF_INPUT else gradients
    others = [value for i, value in enumerate(node.args) if i not in unread]
    return _NONLINEAR if trace is None or _depends(reader, [*others, *node.kwargs.values()]) else trace


@_rule("where")
def _where(reader: _Reader, node: Node) -> Trace:
    trace = reader.trace(node.args[1:])
    return _NONLINEAR if trace is None or _depends(reader, node.args[:1]) else trace


@_rule("sum", "mean")
def _sum(reader: _Reader, node: Node) -> Trace:
    trace = _linear_in_first(reader, node)
    source = node.args[0]
    assert isinstance(source, Node)
    terms = elements_of(source) / max(elements_of(node), 1)
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


def reach_of(
        graph: Graph, name: str, last: Collection[int] | None = None, *,
        rectified: bool = False) -> Reach | None:
    """Returns how far a rounding of the saved tensor ``name`` travels in a compiled backward graph.

    None: no gradient depends on its values, but on its shape, or its sign if that is exact.

    Args:
        graph: the backward graph of ``torch.compile``, in operators of aten.
        name: of the tensor's placeholder in the graph.
        last: positions of the returned gradients that belong to parameters; None: all of them do.
        rectified: the tensor is not negative, and its zeros are kept exactly.
    """
    saved = next(n for n in graph.nodes if n.op == "placeholder" and n.name == name)
    return _Reader(graph, tangential_nodes(graph), last, rectified).reach(saved)
