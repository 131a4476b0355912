"""Tensor parallelism: DTensor parameters and activations, and copies that must not drift apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from brevitas_bp.backward import hooks
from brevitas_bp.backward.noise import replica_group
from brevitas_bp.codec.base import is_plain
from tests.distributed.support import (
    EXACT,
    QUANTIZED,
    Facts,
    Strategy,
    Trained,
    Wrap,
    asked_about_parameters,
    batch,
    digest,
    float_net,
    integer_net,
    integers,
    naive_count,
    rank,
    ratio,
    step,
    train,
    unwrapped,
    wrapper,
)


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2,))


def _columns_rows(first: str, second: str) -> dict[str, ParallelStyle]:
    return {first: ColwiseParallel(), second: RowwiseParallel()}


def integer_parallel(net: nn.Module, wrap: Wrap) -> nn.Module:
    """:func:`integer_net` with its first layer split by columns and its second by rows."""
    return wrap(parallelize_module(net, _mesh(), _columns_rows("0", "2")))


def parallel(net: nn.Module, wrap: Wrap) -> nn.Module:
    """:func:`float_net` with local activations; a norm and the last layer are copies."""
    return wrap(parallelize_module(net, _mesh(), _columns_rows("1", "3")))


def sequence(net: nn.Module, wrap: Wrap) -> nn.Module:
    """:func:`float_net` with DTensor activations from end to end, split over rows."""
    plan: dict[str, ParallelStyle] = {
        "0": SequenceParallel(sequence_dim=0),
        "1": ColwiseParallel(input_layouts=Shard(0), use_local_output=False),
        "3": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
        "6": RowwiseParallel(input_layouts=Shard(0), output_layouts=Replicate())}
    return wrap(parallelize_module(net, _mesh(), plan))


def sharded(net: nn.Module, wrap: Wrap) -> nn.Module:
    """:func:`parallel` within FSDP2: gathered parameters are DTensors again."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model"))
    parallelize_module(net, mesh["model"], _columns_rows("1", "3"))
    for layer in (net[1], net[3], net):  # type: ignore[index]
        fully_shard(layer, mesh=mesh["data"])
    return wrap(net)


STRATEGIES: dict[str, Strategy] = {
    "parallel": parallel, "sequence": sequence, "sharded": sharded}


def rows(strategy: str) -> Tensor:
    """Returns the input of this process: the same whole batch for all, or a part of it."""
    return batch(0).chunk(2)[rank()] if strategy == "sequence" else batch(0)


def compare(folder: Path) -> Facts:
    """Compares the exact and the default policy with a single process on the same batch."""
    x = integers(64, 16, seed=50)
    exact = {name: train(integer_parallel, wrap, integer_net(), x, steps=1).bits[:2]
             for name, wrap in (("plain", unwrapped), ("exact", EXACT))}
    single = train(lambda net, wrap: wrap(net), unwrapped, integer_net(), x, steps=1)
    facts: Facts = {"single": single.bits[:2], "integers": exact}
    wraps = {"plain": unwrapped, "exact": EXACT, "quantized": QUANTIZED, "again": QUANTIZED,
             "late": wrapper(storage="quantize_on_backward")}
    for strategy, make in STRATEGIES.items():
        mine = rows(strategy)
        runs = {name: train(make, wrap, float_net(), mine) for name, wrap in wraps.items()}
        facts[strategy] = {
            "bits": {name: trained.bits for name, trained in runs.items()},
            "saved": runs["quantized"].saved, "ratio": ratio(runs["quantized"]),
            "ratio without shards": ratio(_plain_only(make, mine)),
            "plain saved": runs["plain"].saved, "exact saved": runs["exact"].saved}
    return facts


def _plain_only(strategy: Strategy, x: Tensor) -> Trained:
    """The control: the library does not take DTensors apart."""
    can_encode = hooks.can_encode
    hooks.can_encode = lambda x: is_plain(x) and can_encode(x)
    try:
        return train(strategy, QUANTIZED, float_net(), x)
    finally:
        hooks.can_encode = can_encode


def stored(folder: Path) -> Facts:
    """Reports how the default policy stores each tensor."""
    facts: Facts = {}
    for strategy, make in STRATEGIES.items():
        model = make(float_net(), QUANTIZED)
        model(rows(strategy))
        sites = model.explain().sites.values()  # type: ignore[operator]
        facts[strategy] = [
            [s.module, s.op, s.stored, s.given_bytes, s.stored_bytes] for s in sites]
    return facts


def parameters(folder: Path) -> Facts:
    """Reports whether a DTensor parameter is ever packed, including frozen ones."""
    def freeze(strategy: Strategy) -> Strategy:
        def frozen(net: nn.Module, wrap: Wrap) -> nn.Module:
            net[3].requires_grad_(False)  # type: ignore[index]
            return strategy(net, wrap)

        return frozen

    facts: Facts = {"naive": naive_count(parallel, float_net, batch(0))}
    for strategy, make in STRATEGIES.items():
        x = rows(strategy)
        for default in (False, True):
            facts[f"{strategy} {default}"] = asked_about_parameters(
                make, float_net, x, default=default)
        facts[f"{strategy} frozen"] = asked_about_parameters(freeze(make), float_net, x)
        with torch.autocast("cpu", torch.bfloat16):
            facts[f"{strategy} frozen autocast"] = asked_about_parameters(
                freeze(make), float_net, x)
    return facts


def drift(folder: Path) -> Facts:
    """Compares copies of a parameter on all processes after some steps, with shared and own noise."""
    def after(**options: Any) -> str:
        model = parallel(float_net(), wrapper(**options))
        update = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(5):
            step(model, batch(0))
            update.step()
            update.zero_grad()
        norm = model.get_submodule("module.0")
        return digest(norm.parameters())

    return {
        "own noise": after(rank=rank()), "default": after(), "given": after(rank=0),
        "plain": after(policy="exact")}


def groups(folder: Path) -> Facts:
    """Reports the process group that is recognised, for each way of sharding parameters."""
    def group(prepare: Callable[[nn.Module], Any]) -> tuple[int, ...]:
        net = float_net()
        prepare(net)
        return replica_group(net)

    def two_dims(net: nn.Module, shape: tuple[int, int], hybrid: bool = False) -> None:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "model"))
        if hybrid:
            fully_shard(net, mesh=mesh)
            return
        parallelize_module(net, mesh["model"], _columns_rows("1", "3"))
        for layer in (net[1], net[3], net):  # type: ignore[index]
            fully_shard(layer, mesh=mesh["data"], reshard_after_forward=False)

    def gathered(net: nn.Module) -> tuple[int, ...]:
        """Runs two forward passes before a backward: the second finds the parameters gathered."""
        two_dims(net, (1, 2))
        model = QUANTIZED(net)
        model(batch(0))
        model(batch(0))
        return model._noise.rank(model.module)  # type: ignore[operator]

    def several(net: nn.Module) -> None:
        parallelize_module(net, _mesh(), {"1": ColwiseParallel()})
        alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "model"))["model"]
        parallelize_module(net, alone, {"3": RowwiseParallel()})

    return {
        "plain": group(lambda net: None),
        "parallel": group(lambda net: parallel(net, unwrapped)),
        "fsdp": group(lambda net: fully_shard(net, mesh=_mesh())),
        "hybrid fsdp": group(lambda net: two_dims(net, (1, 2), hybrid=True)),
        "fsdp and parallel": group(lambda net: two_dims(net, (1, 2))),
        "fsdp, parallel of one": group(lambda net: two_dims(net, (2, 1))),
        "gathered": gathered(float_net()),
        "several": group(several)}


SCENARIOS = {
    "tp compare": compare, "tp stored": stored, "tp parameters": parameters, "tp drift": drift,
    "tp groups": groups}

