"""Reading a backward graph: what the rules conclude, and whether numbers confirm it."""

import copy
from collections.abc import Callable
from operator import getitem as operator_getitem
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from brevitas_bp import QuantBackwardWrapper
from brevitas_bp.backward.compiled import hooks as inlined
from brevitas_bp.backward.compiled.linearity import reach_of
from brevitas_bp.backward.compiled.nodes import is_rectified

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")



def backward_graph(function: Callable[[Tensor, Tensor], Any]) -> Graph:
    """A graph of aten operators with inputs ``saved`` and ``tangents_1``, both [64, 64]."""

    def listed(saved: Tensor, tangents_1: Tensor) -> list[Any]:
        output = function(saved, tangents_1)
        return list(output) if isinstance(output, (list, tuple)) else [output]

    graph = make_fx(listed)(torch.ones(64, 64), torch.ones(64, 64)).graph
    for node, name in zip(graph.find_nodes(op="placeholder"), ("saved", "tangents_1")):
        node._rename(name)
    return graph


WEIGHT = torch.eye(64)
INDEX = torch.arange(64).expand(64, 64)


def masked_put(target: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The form that compilers give the backward of an embedding."""
    return torch.ops.aten._unsafe_masked_index_put_accumulate(target, mask, [INDEX[0]], source)


def attention_backward(gradient: Tensor, **given: Tensor) -> Any:
    """Returns gradients of query, key and value [1, 1, 64, 64] from given tensors, else from ones."""
    ones = torch.ones(1, 1, 64, 64)
    q, k, v, out = (
        given[name].view(1, 1, 64, 64) if name in given else ones
        for name in ("query", "key", "value", "out"))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient.view(1, 1, 64, 64), q, k, v, out, torch.full((1, 1, 64), 12.0), 0.0, False)


def pooling_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of a maximum over 2x2 elements; ``x`` is read for its shape alone."""
    pooled, whole = gradient[:32, :32].reshape(1, 32, 32), x.view(1, 64, 64)
    return torch.ops.aten.max_pool2d_with_indices_backward(
        pooled, whole, [2, 2], [2, 2], [0, 0], [1, 1], False, INDEX[:32, :32].reshape(1, 32, 32))


@pytest.mark.parametrize(("function", "reach"), [
    (lambda s, g: g.t() @ s, "weight"),
    (lambda s, g: (g * s).sum(0), "weight"),
    (lambda s, g: torch.cat([s, s.flip(0)])[3:9].t().reshape(-1) * 2 - s[0, 0], "weight"),
    (lambda s, g: s.to(torch.float64).expand(2, 64, 64).clone() * g, "weight"),
    (lambda s, g: (s * g) @ WEIGHT, "all"),
    (lambda s, g: (s @ WEIGHT) * g, "weight"),
    (lambda s, g: torch.addmm(s, s * g, WEIGHT), "all"),
    (lambda s, g: torch.where(g > 0, s, -s), "weight"),
    (lambda s, g: s / (1 + g * g), "weight"),
    (lambda s, g: F.pad(s, (1, 1)).sum() * g, "weight"),
    (lambda s, g: torch.zeros_like(s) + g, None),
    (lambda s, g: torch.zeros(64, 64).scatter_add(1, INDEX, s * g) @ WEIGHT, "all"),
    (lambda s, g: s.index_add(0, INDEX[0], g), "weight"),
    (lambda s, g: masked_put(g, INDEX[0] > 3, s * g) @ WEIGHT, "all"),
    (lambda s, g: attention_backward(g, value=s), "weight"),
    (lambda s, g: attention_backward(g, out=s)[0] @ WEIGHT, "all"),
    (lambda s, g: attention_backward(s), "weight"),
    (lambda s, g: g, None),
    (lambda s, g: pooling_backward(g, s), None),
    (lambda s, g: pooling_backward(s, s), "weight"),
    (lambda s, g: pooling_backward(s, g), "weight"),
    (lambda s, g: torch.ops.aten.silu_backward(s * g, g), "weight"),
    (lambda s, g: torch.ops.aten.gelu_backward(s * g, g) @ WEIGHT, "all"),
    # Not linear.
    (lambda s, g: s * s, "nonlinear"),
    (lambda s, g: s @ s, "nonlinear"),
    (lambda s, g: g / s, "nonlinear"),
    (lambda s, g: g * s.exp(), "nonlinear"),
    (lambda s, g: g * (s > 0), "nonlinear"),
    (lambda s, g: torch.where(s > 0, g, 0.0), "nonlinear"),
    (lambda s, g: g * s.to(torch.int32), "nonlinear"),
    (lambda s, g: masked_put(g, s[0] > 3, g), "nonlinear"),
    (lambda s, g: attention_backward(g, query=s), "nonlinear"),
    (lambda s, g: attention_backward(s * g, value=s), "nonlinear"),
    (lambda s, g: g.scatter_add(1, s.to(torch.int64), g), "nonlinear"),
    (lambda s, g: g * s.view(torch.int32), "nonlinear"),
    (lambda s, g: torch.div(s, 2.0, rounding_mode="floor") * g, "nonlinear"),
    (lambda s, g: s.sum() * s, "nonlinear"),
    (lambda s, g: torch.ops.aten.silu_backward(g, s), "nonlinear"),
    (lambda s, g: (g @ s).relu(), "nonlinear"),
])
def test_rules(function: Callable[[Tensor, Tensor], Any], reach: str | None) -> None:
    assert reach_of(backward_graph(function), "saved") == reach


@pytest.mark.parametrize(("function", "reach"), [
    (lambda s, g: torch.where(s <= 0, 0.0, g).t() @ s, "weight"),
    (lambda s, g: torch.where(s.view(4096).detach() > 0, g.view(4096), 0.0), None),
    (lambda s, g: torch.ops.aten.threshold_backward(g, s, 0), None),
    (lambda s, g: pooling_backward(torch.where(s <= 0, 0.0, g), s), None),
    (lambda s, g: torch.ops.aten.threshold_backward(s * g, s, 0) @ WEIGHT, "all"),
    # The comparison is with another border, or of another tensor, or uses more than the sign.
    (lambda s, g: torch.where(s <= 1, 0.0, g), "nonlinear"),
    (lambda s, g: torch.where(s + 1 <= 0, 0.0, g), "nonlinear"),
    (lambda s, g: torch.where(s <= g, 0.0, g), "nonlinear"),
    (lambda s, g: torch.ops.aten.threshold_backward(g, s, 0.5), "nonlinear"),
    (lambda s, g: torch.where(s.view(torch.int32) <= 0, 0.0, g), "nonlinear"),
    (lambda s, g: torch.where(s <= 0, 0.0, g * s) * s, "nonlinear"),
])
def test_comparisons_with_zero_are_constants_of_what_is_rectified(
        function: Callable[[Tensor, Tensor], Any], reach: str | None) -> None:
    graph = backward_graph(function)
    assert reach_of(graph, "saved") == "nonlinear"
    assert reach_of(graph, "saved", rectified=True) == reach


@pytest.mark.parametrize(("function", "expected"), [
    (lambda x: x.relu(), True), (lambda x: x.relu().view(-1).t(), True),
    (lambda x: x.clamp_min(0), True), (lambda x: x.clamp_min(1), False),
    (lambda x: x.relu().view(torch.float16), False),
    (lambda x: x.relu() - 1, False), (lambda x: F.leaky_relu(x), False), (lambda x: x.view(-1), False)])
def test_outputs_of_relu_are_recognised(
        function: Callable[[Tensor], Tensor], expected: bool) -> None:
    graph = make_fx(function)(torch.ones(4, 4)).graph
    assert is_rectified(graph.output_node().args[0]) is expected  # pyright: ignore


def test_all_that_is_returned_counts() -> None:
    graph = backward_graph(lambda s, g: (g.t() @ s, s.exp()))
    assert reach_of(graph, "saved") == "nonlinear"


def test_what_leaves_the_graph_goes_further_up() -> None:
    graph = backward_graph(lambda s, g: (g.sum(0), s * g))
    assert reach_of(graph, "saved", last=[0, 1]) == "weight"
    assert reach_of(graph, "saved", last=[0]) == "all"
    # Outputs that depend only on the other gradient pass nothing on.
    assert reach_of(graph, "saved", last=[1]) == "weight"


def test_unknown_operators_are_nonlinear() -> None:
    def graph(target: Any, op: str = "call_function") -> Graph:
        result = Graph()
        saved, _ = result.placeholder("saved"), result.placeholder("tangents_1")
        result.output(([result.create_node(op, target, (saved,))],))
        return result

    assert reach_of(graph(torch.ops.aten.neg.default), "saved") == "weight"
    assert reach_of(graph(torch.ops.brevitas_bp.pack_bits.default), "saved") == "nonlinear"
    assert reach_of(graph(abs), "saved") == "nonlinear"
    assert reach_of(graph("part", "call_module"), "saved") == "nonlinear"


@pytest.mark.parametrize("name", ["value", "out"])
def test_the_gradient_of_an_attention_mask_depends_on_value_and_output(name: str) -> None:
    operator = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
    names = [argument.name for argument in operator._schema.arguments]
    graph = Graph()
    saved, gradient = graph.placeholder("saved"), graph.placeholder("tangents_1")
    other = graph.placeholder("other")
    given = {"grad_out_": gradient, name: saved}
    backward = graph.call_function(operator, tuple(given.get(n, other) for n in names))
    outputs = [graph.call_function(operator_getitem, (backward, i)) for i in range(4)]
    square = graph.call_function(torch.ops.aten.mul.Tensor, (outputs[3], outputs[3]))
    graph.output(([outputs[2]],))
    assert reach_of(graph, "saved") is None
    for returned, reach in ((outputs[3], "all"), (square, "nonlinear")):
        graph.output_node().args = ([returned],)
        assert reach_of(graph, "saved", last=[]) == reach


def norm_backward(x: Tensor, g: Tensor) -> Tensor:
    """The formula that compilers give the backward of a norm, for statistics of 0 and 1."""
    return g - g.mean(0) - x * (g * x).mean(0)


def test_products_within_a_norm_are_taken_for_independent() -> None:
    graph = backward_graph(lambda s, g: norm_backward(s, g))
    assert reach_of(graph, "saved") == "nonlinear"
    for node in graph.nodes:
        node.meta["original_aten"] = torch.ops.aten.native_batch_norm_backward.default
    assert reach_of(graph, "saved") == "norm"


def test_few_elements_are_no_norm() -> None:
    graph = backward_graph(lambda s, g: norm_backward(s[:31], g[:31]))
    for node in graph.nodes:
        node.meta["original_aten"] = torch.ops.aten.native_batch_norm_backward.default
    assert reach_of(graph, "saved") == "nonlinear"


class Bilinear(nn.Module):
    """A product of two layers, an attention without softmax, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.second(x)
        return (a @ b.mT) @ a + (a * b).cumsum(0) / 3


class Attention(nn.Module):
    """Attention on chunks of one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(16), nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v)


def conv_net(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), activation(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, groups=2), nn.GroupNorm(2, 4), activation(), nn.AvgPool2d(2), nn.Flatten(),
        nn.LazyLinear(3))


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "silu": lambda: (conv_net(nn.SiLU), torch.randn(4, 2, 14, 14)),
    "relu": lambda: (conv_net(nn.ReLU), torch.randn(4, 2, 14, 14)),
    "hardswish": lambda: (conv_net(nn.Hardswish), torch.randn(4, 2, 14, 14)),
    "bilinear": lambda: (Bilinear(), torch.randn(2, 5, 16)),
    "attention": lambda: (Attention(), torch.randn(2, 5, 16)),
    "embedding": lambda: (
        nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 16), nn.GELU(), nn.Softmax(-1)),
        torch.arange(9)),
}


def captured(net: nn.Module, x: Tensor) -> list[tuple[GraphModule, str, str]]:
    """Returns (backward graph, saved tensor, reach) for each reading while a network is compiled."""
    seen: list[tuple[GraphModule, str, str]] = []

    def spy(graph: Graph, name: str, last: Any = None, **options: Any) -> Any:
        reach = reach_of(graph, name, last, **options)
        # Copy the graph, since it changes while hooks are inlined.
        seen.append((GraphModule({}, copy.deepcopy(graph)), name, reach))
        return reach

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inlined, "reach_of", spy)
        torch._dynamo.reset()
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        QuantBackwardWrapper(compiled, policy="exact", seed=1)(x)
    return seen


def departure(graph: GraphModule, name: str) -> float:
    """Returns how far the graph is from affine in one of its inputs, relative to its result."""
    inputs: list[Any] = []
    generator = torch.Generator().manual_seed(3)
    place = -1
    for i, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        value = node.meta["val"]
        if not value.is_floating_point():
            inputs.append(torch.zeros(value.shape, dtype=value.dtype))
        else:
            random = torch.rand(value.shape, dtype=value.dtype, generator=generator) + 0.1
            inputs.append(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(
                random))
        place = i if node.name == name else place
    x = inputs[place]
    step = torch.rand(x.shape, dtype=x.dtype, generator=generator)

    def returned(moved: Tensor) -> Tensor:
        values = graph(*inputs[:place], moved, *inputs[place + 1:])
        return torch.cat([v.flatten() for v in values if isinstance(v, Tensor)])

    with torch.no_grad():
        low, middle, high = returned(x), returned(x + step), returned(x + 2 * step)
    return float((high - 2 * middle + low).norm() / middle.norm())


@pytest.mark.parametrize("name", NETS)
def test_what_is_read_as_linear_is_linear(name: str) -> None:
    torch.manual_seed(0)
    with torch.random.fork_rng():
        net, x = NETS[name]()
        net(x)
    net, x = net.double(), x.double() if x.is_floating_point() else x
    read = captured(net, x)
    assert read
    linear = [departure(g, n) for g, n, reach in read if reach in ("weight", "all")]
    others = [departure(g, n) for g, n, reach in read if reach in ("nonlinear", "norm")]
    # Rounding errors of float64, 2**-53 each, in sums of at most some thousand terms.
    assert max(linear, default=0.0) < 1e-11
    # The control: tensors read as nonlinear really are, except where a rule is missing.
    assert name == "bilinear" or max(others) > 1e-3

