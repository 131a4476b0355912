"""Graphs of the forward pass: traced, scripted, exported; around a wrapper and inside it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from brevitas_bp import QuantBackwardWrapper
from tests.backward.support import assert_same, run
from tests.composition.support import POLICIES, X


def traced_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.ReLU(), nn.Linear(64, 8))


TRACES: dict[str, Callable[[nn.Module], Any]] = {
    "jit.trace": lambda m: torch.jit.trace(m, (X,)),
    "jit.script": torch.jit.script,
    "export": lambda m: torch.export.export(m, (X,)).module(),
    "make_fx": lambda m: make_fx(m)(X),
}


def operations(graph: Any) -> list[str]:
    """Returns the operations of a traced graph."""
    if isinstance(graph, torch.jit.ScriptModule):
        kinds = [node.kind() for node in graph.inlined_graph.nodes()]
        return [kind for kind in kinds if kind.startswith("aten::")]
    return [str(node.target) for node in graph.graph.nodes if node.op.startswith("call")]


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", TRACES)
def test_a_traced_wrapper_is_the_graph_of_its_module(name: str, policy: str, nested: bool) -> None:
    module = traced_net()
    model = QuantBackwardWrapper(module, policy=policy)
    graphs = [TRACES[name](nn.Sequential(m) if nested else m) for m in (module, model)]
    assert torch.equal(graphs[1](X), module(X))
    recorded = [operations(graph) for graph in graphs]
    assert len(recorded[0]) >= 4
    assert recorded[0] == recorded[1]  # no operation of the library
    model(X)
    assert model.explain().sites  # the control: outside tracing the wrapper works


def test_symbolic_tracing_is_refused_with_a_way_out() -> None:
    module = traced_net()
    model = QuantBackwardWrapper(module)
    for root in (model, nn.Sequential(model)):
        with pytest.raises(TypeError, match=r"torch\.fx traces through.*symbolic_trace\(module\)"):
            fx.symbolic_trace(root)
    # The ways out: wrap the traced module, or keep the wrapper as a leaf.
    wrapped = QuantBackwardWrapper(fx.symbolic_trace(module), policy="exact")
    assert_same(run(wrapped, X).grads, run(module, X).grads)

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, QuantBackwardWrapper) or super().is_leaf_module(
                m, module_qualified_name)

    root = nn.Sequential(model)
    graph = fx.GraphModule(root, Tracer().trace(root))
    graph(X)
    assert any("rotated" in site.stored for site in model.explain().sites.values())


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("compile_", [torch.jit.script, lambda m: torch.jit.trace(m, (X,))])
def test_torchscript_inside_of_a_wrapper(compile_: Any, policy: str) -> None:
    module = traced_net()
    plain = run(module, X)
    model = QuantBackwardWrapper(compile_(module), policy=policy)
    x = X.clone().requires_grad_()
    if policy == "op_aware":
        with pytest.warns(UserWarning, match="compiled graph saves tensors.*policy='all'"):
            output = model(x)
    else:
        output = model(x)
    output.backward(torch.linspace(-1, 2, output.numel()).cos().view(output.shape))
    assert torch.equal(output, plain.output)
    assert x.grad is not None
    assert torch.equal(x.grad, plain.grads["input 0"]) == (policy != "all")
