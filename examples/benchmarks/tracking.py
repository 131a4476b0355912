"""Times what ``track_saved_memory`` around a training loop costs per step.

    python examples/benchmarks/tracking.py [--model gpt vit] [--rounds 8] [--markdown]

A step is forward, loss, backward and AdamW of a wrapped network (2 bits). Steps with and without
tracking take turns in one run, and the smallest time of each counts. Before a tracked step, one step
within the same block is not timed.
"""

import argparse
import time
from typing import Any

import torch
import variants
from networks import MORE_TASKS, step
from output import Measured, add_output_options, on_threads, publish
from torch import Tensor, nn

from brevitas_bp import track_saved_memory


def seconds_of(model: nn.Module, inputs: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """Runs one training step; returns its time."""
    start = time.perf_counter()
    step(model, inputs)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def measure(name: str, batch: int | None, size: int, rounds: int) -> dict[str, Any]:
    """Returns the row of a network."""
    torch.manual_seed(0)
    build, usual = MORE_TASKS[name]
    task = build(batch or usual, size)
    model = variants.ours(task, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    seconds_of(model, task.inputs, optimizer)
    without = within = float("inf")
    for _ in range(rounds):
        without = min(without, seconds_of(model, task.inputs, optimizer))
        with track_saved_memory(model) as report:
            seconds_of(model, task.inputs, optimizer)
            within = min(within, seconds_of(model, task.inputs, optimizer))
            assert report.last_step is not None and report.steps == 2
            tensors = report.last_step.tensors
    return {
        "model": f"{name}, batch {len(task.inputs)}", "saved tensors": tensors,
        "step, ms": without * 1e3, "tracked, ms": within * 1e3, "ratio": within / without,
        "us a tensor": (within - without) / tensors * 1e6, "summary": report.summary()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", default=list(MORE_TASKS), choices=list(MORE_TASKS))
    parser.add_argument("--batch", type=int, help="batch size, the model's own by default")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_output_options(parser, "runs/bench/tracking.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = [measure(name, options.batch, options.size, options.rounds) for name in options.model]
    title = f"A tracked training step, {options.size} px, {on_threads(options.threads)}"
    publish([Measured("tracking", title, rows)], options)


if __name__ == "__main__":
    main()
