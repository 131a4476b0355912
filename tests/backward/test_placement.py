"""Compiled graphs encode a tensor where it is made, and decode it where it is first read."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import Graph, GraphModule

from brevitas_bp import QuantBackwardWrapper
from brevitas_bp.backward.compiled import hooks as inlined

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")

DEPTH = 5


def graphs(monkeypatch: pytest.MonkeyPatch, moved: bool) -> tuple[Graph, Graph]:
    """Returns forward and backward graph of a deep network that stores all its saved tensors."""
    torch._dynamo.reset()
    if not moved:
        for name in ("raise_encoders", "sink_decoders"):
            monkeypatch.setattr(inlined, name, lambda graph: None)
    found: list[Graph] = []

    def compiler(module: GraphModule, inputs: Any) -> Any:
        found.append(module.graph)
        return make_boxed_func(module.forward)

    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(DEPTH) for layer in (nn.Linear(64, 64), nn.SiLU())))
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    wrapper = QuantBackwardWrapper(torch.compile(net, backend=backend), seed=0)
    wrapper(torch.randn(32, 64, requires_grad=True)).sum().backward()
    torch._dynamo.reset()
    forward, backward = found
    return forward, backward


def test_both_encoders_of_a_relus_output_stand_behind_it() -> None:
    torch._dynamo.reset()
    found: list[Graph] = []

    def compiler(module: GraphModule, inputs: Any) -> Any:
        found.append(module.graph)
        return make_boxed_func(module.forward)

    torch.manual_seed(0)
    net = nn.Sequential(*(
        layer for _ in range(DEPTH) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())))
    wrapper = QuantBackwardWrapper(
        torch.compile(net, backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler)), seed=0)
    x = torch.randn(4, 8, 16, 16).contiguous(memory_format=torch.channels_last)
    wrapper(x).sum().backward()
    torch._dynamo.reset()
    kinds = (*ENCODE, "pack_positive")
    assert len(places(found[0], "pack_positive")) == DEPTH
    # Two operations for one tensor, two for the input. The last tensors to be decided stay in place.
    assert alive_at_once(found[0], kinds, "convolution") <= 4


ENCODE = ("encode", "encode_seeded")


def places(graph: Graph, *names: str) -> list[int]:
    return [i for i, node in enumerate(graph.nodes) if getattr(node.target, "_opname", "") in names]


def alive_at_once(graph: Graph, kinds: tuple[str, ...], made: str) -> int:
    """Returns the most operations of ``kinds`` between two operations of ``made``."""
    longest = row = 0
    for node in graph.nodes:
        name = getattr(node.target, "_opname", "")
        row = row + 1 if name in kinds else 0 if name == made else row
        longest = max(longest, row)
    return longest


def test_tensors_are_not_alive_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        forward, backward = graphs(patch, moved=False)
    stored = len(places(forward, *ENCODE))
    assert stored >= 2 * DEPTH - 1
    # The control: everything is encoded at the end and decoded at the beginning.
    assert alive_at_once(forward, ENCODE, "addmm") == stored
    assert alive_at_once(backward, ("decode",), "mm") == stored

    forward, backward = graphs(monkeypatch, moved=True)
    assert len(places(forward, *ENCODE)) == stored == len(places(backward, "decode"))
    # Between two products: an input and tensors computed from it. The last one decided stays in place.
    assert alive_at_once(forward, ENCODE, "addmm") <= 3
    assert alive_at_once(backward, ("decode",), "mm") <= 3
