"""A pass refers to the user's modules, and is freed without the garbage collector."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from brevitas_bp import OpAware, QuantBackwardWrapper, SavedTensor
from brevitas_bp.backward import wrapper as wrapper_module
from brevitas_bp.backward.saved import Decision


def test_a_pass_leaves_no_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[weakref.ref[Any]] = []
    make = wrapper_module.ForwardPass

    def noted(*args: Any, **kwargs: Any) -> Any:
        passes.append(weakref.ref(made := make(*args, **kwargs)))
        return made

    monkeypatch.setattr(wrapper_module, "ForwardPass", noted)
    net = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4))
    model = QuantBackwardWrapper(net, seed=0)
    gc.disable()
    try:
        model(torch.randn(64, 64)).sum().backward()
        assert [made() for made in passes] == [None]
    finally:
        gc.enable()


class OutOfMemory(OpAware):
    """A policy that fails at the statistics of a norm, as a device without memory may."""

    def decide(self, saved: SavedTensor) -> Decision:
        if saved.is_norm_statistic:
            raise torch.OutOfMemoryError
        return super().decide(saved)


def test_an_exception_in_the_middle_of_a_norm_leaves_nothing() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 4))
    model = QuantBackwardWrapper(net, seed=0, policy=OutOfMemory())
    # Held, so that no tensor that another test has left can go, and give its address to a new one.
    before = live_tensors()
    with pytest.raises(torch.OutOfMemoryError):
        model(torch.randn(64, 64))
    assert not live_tensors().keys() - before.keys()


def live_tensors() -> dict[int, torch.Tensor]:
    gc.collect()
    return {id(thing): thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)}
