"""A pass refers to the user's modules, and is freed without the garbage collector."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from brevitas_bp import QuantBackwardWrapper
from brevitas_bp.backward import wrapper as wrapper_module


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
