"""ZeRO and pipelines of torch.distributed, with the wrapper."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from brevitas_bp import track_saved_memory
from tests.distributed.ddp import inside
from tests.distributed.support import (
    EXACT,
    QUANTIZED,
    Facts,
    Wrap,
    batch,
    digest,
    float_net,
    grads,
    integers,
    rank,
    train,
    unwrapped,
)


def zero(folder: Path) -> Facts:
    """Optimizer states split between processes."""
    # Import late: the module warns of deprecations within torch, and pytest turns warnings into errors.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    make = partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.Adam, lr=1e-3)
    wraps = {"plain": unwrapped, "exact": EXACT, "quantized": QUANTIZED, "again": QUANTIZED}
    return {
        name: train(inside, wrap, float_net(), batch(rank()), optimizer=make).bits
        for name, wrap in wraps.items()}


def pipeline(folder: Path) -> Facts:
    """Runs two stages and two micro-batches; a single process computes the same in the same order."""
    def stage(wrap: Wrap) -> tuple[str, Any]:
        net = float_net()
        part = net[:3] if rank() == 0 else net[3:]  # type: ignore[index]
        model = wrap(part)
        runs = ScheduleGPipe(
            PipelineStage(model, rank(), 2, torch.device("cpu")), n_microbatches=2,
            loss_fn=lambda output, target: (output * target).sum(), scale_grads=False)
        given = {} if rank() == 0 else {"target": integers(64, 8, seed=9)}
        with track_saved_memory(model) as report:
            runs.step(*([batch(0)] if rank() == 0 else []), **given)
        assert report.live_bytes == 0
        return digest(grads(model)), model

    def single() -> str:
        net = float_net()
        for x, target in zip(batch(0).chunk(2), integers(64, 8, seed=9).chunk(2)):
            (net(x) * target).sum().backward()
        return digest(grads(net[:3] if rank() == 0 else net[3:]))  # type: ignore[index]

    return {
        "single": single(), "plain": stage(unwrapped)[0], "exact": stage(EXACT)[0],
        "quantized": stage(QUANTIZED)[0], "again": stage(QUANTIZED)[0]}


SCENARIOS: dict[str, Any] = {"zero": zero, "pipeline": pipeline}

