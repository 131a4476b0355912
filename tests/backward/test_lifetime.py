"""H5, H22: a payload lives exactly as long as the graph node that needs it."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from brevitas_bp import Packed, QuantBackwardWrapper, SavedTensor, track_saved_memory
from brevitas_bp.backward.saved import Decision
from tests.backward.support import NETS, QUANTIZING, Apply, identity_hooks, net


class Watch:
    """Weak references to all payloads, and to the storages of all saved activations."""

    def __init__(self, model: QuantBackwardWrapper) -> None:
        self.payloads: list[weakref.ref[Packed]] = []
        self.storages: list[StorageWeakRef] = []
        self.inputs: set[int] = set()
        model._listeners.append(self._note)

    def _note(
            self, saved: SavedTensor, packed: Packed, decision: Decision,
            originals: Sequence[Tensor]) -> None:
        self.payloads.append(weakref.ref(packed))
        tensors = [*packed.tensors, saved.tensor, *originals]
        self.storages += [StorageWeakRef(t.untyped_storage()) for t in tensors]

    def alive(self) -> int:
        gc.collect()
        return sum(p() is not None for p in self.payloads) + sum(
            not s.expired() and s.cdata not in self.inputs for s in self.storages)


def test_functions_defined_in_a_forward_pass_are_freed() -> None:
    """The library remembers per class if nodes show parameters, unless the class holds a tensor."""
    held: list[weakref.ref[Tensor]] = []

    def forward(x: Tensor) -> Tensor:
        factor = torch.randn(64)
        held.append(weakref.ref(factor))

        class Multiply(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x * factor

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Tensor:
                return grads[0] * factor

        y = Multiply.apply(x)
        assert isinstance(y, Tensor)
        return y.square()

    model = QuantBackwardWrapper(Apply(forward), seed=0)
    for _ in range(3):
        model(torch.randn(64, 64, requires_grad=True)).sum().backward()
    gc.collect()
    assert [ref() for ref in held] == [None] * 3


def test_tensor_that_saves_itself_is_freed() -> None:
    x = torch.ones(8, requires_grad=True)
    with identity_hooks():
        y = x.exp()
    leaked = StorageWeakRef(y.untyped_storage())
    del y
    gc.collect()
    assert not leaked.expired()  # the control: node and tensor hold each other

    y = QuantBackwardWrapper(Apply(torch.exp), policy="exact")(x)
    ours = StorageWeakRef(y.untyped_storage())
    del y
    gc.collect()
    assert ours.expired()


@pytest.mark.parametrize("end", ["backward", "del"])
@pytest.mark.parametrize("policy", [*QUANTIZING, "exact"])
@pytest.mark.parametrize("name", sorted(set(NETS) - {"eval"}))
def test_everything_is_freed_with_the_graph(name: str, policy: str, end: str) -> None:
    module, inputs = net(name)
    model = QuantBackwardWrapper(module, policy=policy)
    watch = Watch(model)
    watch.inputs = {x.untyped_storage()._cdata for x in inputs}
    with track_saved_memory(model) as report:
        loss = model(*inputs).sum()
    assert report.live_bytes == report.stored_bytes > 0
    assert watch.alive()
    if end == "backward":
        loss.backward()
    del loss
    assert watch.alive() == 0
    assert report.live_bytes == 0


@pytest.mark.parametrize("policy", QUANTIZING)
@pytest.mark.parametrize("name", NETS)
def test_outputs_are_freed_with_the_graph_when_nobody_listens(name: str, policy: str) -> None:
    # A listener changes how rewritten operations run, so the test above does not cover this case.
    module, inputs = net(name)
    outputs: list[StorageWeakRef] = []

    def note(part: nn.Module, args: object, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        outputs.append(StorageWeakRef(first.untyped_storage()))

    for part in module.modules():
        part.register_forward_hook(note)
    loss = QuantBackwardWrapper(module, policy=policy)(*inputs).sum()
    assert outputs
    del loss
    gc.collect()
    assert all(output.expired() for output in outputs)


@pytest.mark.parametrize("policy", QUANTIZING)
def test_forwards_without_backward_leave_nothing(policy: str) -> None:
    model = QuantBackwardWrapper(
        nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)), policy=policy)
    watch = Watch(model)
    for _ in range(5):
        model(torch.randn(64, 64))
    assert len(watch.payloads) == 5 * 3
    assert watch.alive() == 0


@pytest.mark.parametrize("policy", QUANTIZING)
def test_half_of_the_graph_may_never_get_a_backward(policy: str) -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x.sin()), self.b(x.cos())

    model = QuantBackwardWrapper(TwoHeads(), policy=policy)
    watch = Watch(model)
    x = torch.randn(64, 64, requires_grad=True)
    first, second = model(x * 1)
    first.sum().backward()
    assert watch.alive()
    del first, second
    assert watch.alive() == 0
