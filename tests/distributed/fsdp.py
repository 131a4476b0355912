"""FSDP2: parameters are gathered for each use, and freed in between."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

from brevitas_bp import SavedTensor
from brevitas_bp.backward.parameters import ParameterSet
from tests.backward.support import Spy
from tests.distributed.ddp import Fails, compare_one, installed, raising
from tests.distributed.support import (
    EXACT,
    QUANTIZED,
    Facts,
    Strategy,
    Wrap,
    asked_about_parameters,
    batch,
    digest,
    float_net,
    for_each,
    grads,
    naive_count,
    rank,
    ratio,
    step,
    train,
    unwrapped,
)


def shard(net: nn.Module, **options: Any) -> nn.Module:
    """Makes each layer with parameters an FSDP unit, and the whole network another unit."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in net:  # type: ignore[attr-defined]
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **options)
    return net


def outside(net: nn.Module, wrap: Wrap, **options: Any) -> nn.Module:
    """Puts the wrapper around all units."""
    mesh = init_device_mesh("cpu", (2,))
    return wrap(fully_shard(shard(net, **options), mesh=mesh, **options))


def inside(net: nn.Module, wrap: Wrap, **options: Any) -> nn.Module:
    """Puts the wrapper within the outermost unit."""
    mesh = init_device_mesh("cpu", (2,))
    return fully_shard(wrap(shard(net, **options)), mesh=mesh, **options)


BFLOAT16 = {"mp_policy": MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
OPTIONS: dict[str, dict[str, Any]] = {
    "reshard": {"reshard_after_forward": True}, "keep": {"reshard_after_forward": False}}
ORDERS: dict[str, Callable[..., nn.Module]] = {"inside": inside, "outside": outside}


def compare(folder: Path) -> Facts:
    """Compares both orders, with and without resharding after forward."""
    return for_each(ORDERS, OPTIONS, compare_one)


def bfloat16(folder: Path) -> Facts:
    """Compares both orders, with parameters gathered as bfloat16."""
    facts: Facts = {}
    wraps = {"plain": unwrapped, "exact": EXACT, "quantized": QUANTIZED, "again": QUANTIZED}
    for order, make in ORDERS.items():
        runs = {name: train(partial(make, **BFLOAT16), wrap, float_net(), batch(rank()), steps=2)
                for name, wrap in wraps.items()}
        facts[order] = {
            "bits": {name: trained.bits for name, trained in runs.items()},
            "ratio": ratio(runs["quantized"])}
    return facts


class Frozen(nn.Module):
    """A frozen weight used whole, in halves and transposed, between trained layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 8)
        self.frozen = nn.Linear(64, 64, bias=False).requires_grad_(False)
        self.halves = nn.Parameter(torch.randn(128, 64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(torch.tanh(self.first(x)))
        left, right = self.halves.chunk(2)
        return self.last(F.linear(x, left) + F.linear(x, right) + x @ self.frozen.weight)


def shard_frozen(net: nn.Module, wrap: Wrap, *, around: bool, **options: Any) -> nn.Module:
    """Makes one unit of :class:`Frozen`; FSDP2 allows frozen and trained parameters in one unit."""
    mesh = init_device_mesh("cpu", (2,))
    if around:
        return wrap(fully_shard(net, mesh=mesh, **options))
    return fully_shard(wrap(net), mesh=mesh, **options)


def parameters(folder: Path) -> Facts:
    """Reports if a gathered parameter, trained or frozen, is packed by the policy that packs most."""
    x = batch(rank())
    controls: Facts = {
        "naive": naive_count(outside, float_net, x),
        "naive frozen": naive_count(partial(shard_frozen, around=True), Frozen, x),
        "not looked up": without_second_look(partial(shard_frozen, around=True), x)}
    facts: Facts = {}
    for order, make in ORDERS.items():
        for default in (False, True):
            for name, options in (("", {}), (" bf16", BFLOAT16)):
                facts[f"{order} {default}{name}"] = asked_about_parameters(
                    partial(make, **options), float_net, x, default=default)
    for around in (True, False):
        for name, options in (("", {}), (" bf16", BFLOAT16)):
            facts[f"frozen {around}{name}"] = asked_about_parameters(
                partial(shard_frozen, around=around, **options), Frozen, x)
    return {"controls": controls, "counts": facts}


class Keeping(Spy):
    """Keeps every tensor: FSDP2 cannot free a parameter whose memory NumPy has made an array of."""

    def __call__(self, saved: SavedTensor) -> None:
        super().__call__(saved)


def without_second_look(strategy: Strategy, x: Tensor) -> tuple[int, int]:
    """The control: without the lookup, gathered frozen parameters are taken for activations."""
    lookup = ParameterSet._is_gathered_frozen
    ParameterSet._is_gathered_frozen = lambda self, x: False  # type: ignore[method-assign]
    try:
        return asked_about_parameters(strategy, Frozen, x, spy=Keeping())
    finally:
        ParameterSet._is_gathered_frozen = lookup  # type: ignore[method-assign]


def failure(folder: Path) -> Facts:
    """Fails in forward in all processes; the next step equals that of a fresh job."""
    def make() -> tuple[nn.Module, Fails]:
        fails = Fails()
        return outside(nn.Sequential(*float_net(), fails), QUANTIZED), fails

    (model, fails), (fresh, _) = make(), make()
    state = model.noise_state()  # type: ignore[operator]
    fails.told = True
    with raising(True):
        step(model, batch(rank()))
    after = installed()
    fails.told = False
    model.set_noise_state(state)  # type: ignore[operator]
    step(model, batch(rank()))
    step(fresh, batch(rank()))
    return {"after": after, "grads": [digest(grads(m)) for m in (model, fresh)]}


SCENARIOS = {
    "fsdp compare": compare, "fsdp bfloat16": bfloat16, "fsdp parameters": parameters,
    "fsdp failure": failure}
