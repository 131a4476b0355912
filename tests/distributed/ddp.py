"""DistributedDataParallel around the wrapper and inside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.modules import module as torch_module
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

from brevitas_bp.backward import location as ops
from brevitas_bp.private import top_hooks
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


def inside(net: nn.Module, wrap: Wrap, **options: Any) -> nn.Module:
    """Builds DDP(QuantBackwardWrapper(net))."""
    if "find_unused_parameters" in options:
        net.unused = nn.Parameter(torch.ones(3))
    return DDP(wrap(net), **options)


def outside(net: nn.Module, wrap: Wrap, **options: Any) -> nn.Module:
    """Builds QuantBackwardWrapper(DDP(net))."""
    return wrap(inside(net, lambda net: net, **options))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.01}}
ORDERS: dict[str, Callable[..., nn.Module]] = {"inside": inside, "outside": outside}


def compare(folder: Path) -> Facts:
    """Compares both orders with all options, under the exact and the default policy."""
    return for_each(ORDERS, OPTIONS, compare_one)


def compare_one(strategy: Strategy) -> Facts:
    """Returns the results of one strategy: plain, wrapped exactly, and quantized."""
    whole = torch.cat([integers(64, 16, seed=50 + r) for r in (0, 1)])
    x, mine = integers(64, 16, seed=50 + rank()), batch(rank())
    single = train(lambda net, wrap: wrap(net), unwrapped, integer_net(), whole, steps=1)
    for p in single.model.parameters():
        assert p.grad is not None
        p.grad /= 2  # DDP takes the mean over processes
    exact = {name: train(strategy, wrap, integer_net(), x).bits for name, wrap in (
        ("plain", unwrapped), ("exact", EXACT))}
    runs = {name: train(strategy, wrap, float_net(), mine) for name, wrap in (
        ("plain", unwrapped), ("exact", EXACT), ("quantized", QUANTIZED), ("again", QUANTIZED))}
    return {
        "single": digest(grads(single.model)), "integers": exact,
        "bits": {name: trained.bits for name, trained in runs.items()},
        "saved": runs["quantized"].saved, "ratio": ratio(runs["quantized"])}


def parameters(folder: Path) -> Facts:
    """Reports whether a parameter is ever packed."""
    x = batch(rank())
    return {
        "naive": naive_count(inside, float_net, x),
        **{f"{order} {default}": asked_about_parameters(make, float_net, x, default=default)
           for order, make in ORDERS.items() for default in (False, True)}}


def accumulate(folder: Path) -> Facts:
    """Accumulates without synchronisation, then with it; checks noise if all ranks see equal data."""
    def run(wrap: Wrap, x: torch.Tensor) -> tuple[str, str]:
        model = DDP(wrap(float_net()))
        with model.no_sync():
            step(model, x)
        mine = digest(grads(model))
        step(model, x)
        return mine, digest(grads(model))

    return {
        "plain": run(unwrapped, batch(rank())), "exact": run(EXACT, batch(rank())),
        "own noise": run(QUANTIZED, batch(0)), "again": run(QUANTIZED, batch(0)),
        "other seed": run(wrapper(seed=4), batch(0)),
        "shared noise": run(wrapper(rank=0), batch(0))}


def communication_hooks(folder: Path) -> Facts:
    """Reports whether gradient compression works as in the plain job."""
    def compressed(hook: str, wrap: Wrap) -> tuple[str, str, str]:
        def strategy(net: nn.Module, wrap: Wrap) -> nn.Module:
            model = DDP(wrap(net))
            if hook == "fp16":
                model.register_comm_hook(None, default_hooks.fp16_compress_hook)
            else:
                torch.manual_seed(0)
                state = powerSGD_hook.PowerSGDState(None, 1, start_powerSGD_iter=2)
                model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
            return model

        return train(strategy, wrap, float_net(), batch(rank()), steps=4).bits

    wraps = {"plain": unwrapped, "exact": EXACT, "quantized": QUANTIZED}
    return {hook: {name: compressed(hook, wrap) for name, wrap in wraps.items()}
            for hook in ("fp16", "power")}


class Fails(nn.Module):
    """Raises when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.told = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.told:
            raise ArithmeticError("told to")
        return x


def installed() -> list[Any]:
    """Returns what a pass installs: hooks, the location of this thread, module hooks."""
    hooks = torch_module._global_forward_pre_hooks.values()
    watching = any(isinstance(getattr(h, "__self__", None), ops.Location) for h in hooks)
    return [top_hooks(True) is not None, ops.current_location() is not None, watching]


@contextmanager
def raising(told: bool) -> Iterator[None]:
    """Expects the failure within the block."""
    try:
        yield
    except ArithmeticError:
        assert told
    else:
        assert not told


def failure(folder: Path) -> Facts:
    """Fails in all processes, then in one. Afterwards the job continues as if nothing had failed."""
    facts: Facts = {"before": installed()}
    for failing in ([0, 1], [1]):
        fails = Fails()
        model = DDP(QUANTIZED(nn.Sequential(float_net(), fails)))
        state = model.module.noise_state()
        fails.told = rank() in failing
        with raising(fails.told), model.no_sync():
            step(model, batch(rank()))
        fails.told = False
        model.zero_grad()
        model.module.set_noise_state(state)
        step(model, batch(rank()))
        facts[f"after {failing}"] = installed()
        facts[f"grads {failing}"] = digest(grads(model))
    untouched = DDP(QUANTIZED(nn.Sequential(float_net(), Fails())))
    step(untouched, batch(rank()))
    return {**facts, "untouched": digest(grads(untouched))}


def batch_norm(folder: Path) -> Facts:
    """SyncBatchNorm needs a GPU, with the wrapper and without; plain batch norms work."""
    def message(wrap: Wrap) -> str:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(64)))
        try:
            step(DDP(wrap(net)), batch(rank()))
        except ValueError as error:
            return str(error)
        return ""

    def buffers(wrap: Wrap) -> str:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
        trained = train(inside, wrap, net, batch(rank()), steps=1)
        return digest(trained.model.buffers())

    return {
        "messages": [message(unwrapped), message(QUANTIZED)], "installed": installed(),
        "buffers": [buffers(unwrapped), buffers(QUANTIZED)]}


SCENARIOS = {
    "ddp compare": compare, "ddp parameters": parameters, "ddp accumulate": accumulate,
    "ddp communication hooks": communication_hooks, "ddp failure": failure,
    "ddp batch norm": batch_norm}
