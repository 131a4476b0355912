"""H25: ``torch.compile``: hooks around a compiled module, and a compiled wrapper."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from tests.backward.support import assert_same, cotangent, naive_hooks, run

pytestmark = pytest.mark.filterwarnings(
    # Dynamo traces the stack of hooks, whose functions it does not know: it leaves them to Python.
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:Dynamo does not know how to trace:UserWarning",
    "ignore:.*torch.jit.script.* is deprecated:DeprecationWarning",
    "ignore:.*compiled graph saves tensors:UserWarning")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.LayerNorm(64), nn.Linear(64, 8))


def images() -> Tensor:
    return torch.randn(128, 64, generator=torch.Generator().manual_seed(1))


def test_hooks_inside_a_compiled_region_break_its_graph() -> None:
    module = net()

    def hooked(x: Tensor) -> Tensor:
        with naive_hooks():
            return module(x)

    with pytest.raises(Exception, match=r"(?i)unsupported|graph break|saved_tensors_hooks"):
        torch.compile(hooked, backend="eager", fullgraph=True)(images().requires_grad_())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_exact_policy_around_a_compiled_module_changes_no_bit(backend: str) -> None:
    module = net()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    plain = run(compiled, images(), copied=False)
    for parameter in module.parameters():
        parameter.grad = None
    ours = run(QuantBackwardWrapper(compiled, policy="exact"), images(), copied=False)
    assert torch.equal(ours.output, plain.output)
    assert_same(ours.grads, plain.grads)


def test_compiled_module_is_quantized_under_the_policy_for_all() -> None:
    compiled = torch.compile(net(), backend="aot_eager", fullgraph=True)
    model = QuantBackwardWrapper(compiled, policy="all", seed=1)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        with track_saved_memory(model) as report:
            y = model(images().requires_grad_())
        y.backward(cotangent(y))
        assert report.ratio > 6
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert any(not torch.equal(a, b) for a, b in zip(*gradients))  # fresh noise, no recompilation


@pytest.mark.parametrize("policy", ["exact", "op_aware"])
def test_compiled_wrapper_gives_the_gradients(policy: str) -> None:
    module = net()
    plain = run(module, images())
    wrapper = QuantBackwardWrapper(copy.deepcopy(module), policy=policy, seed=1)
    ours = run(torch.compile(wrapper, backend="eager"), images(), copied=False)
    assert torch.equal(ours.output, plain.output)
    names = {name.removeprefix("_orig_mod."): grad for name, grad in ours.grads.items()}
    assert names.keys() == plain.grads.keys()
    if policy == "exact":
        assert_same(names, plain.grads)
    assert all(grad.isfinite().all() for grad in names.values())
