"""Memory of a training step: bytes saved, growth of the process, and the largest batch that fits.

    python examples/benchmarks/memory.py [--model efficientnet_v2_s] [--batch 64] [--limit 256]

Each variant runs in a process of its own. "growth" is that of the resident set from before the forward
pass to its end, with the output alive; "step peak" that over the whole step (on CUDA the allocator's
peak). "fits" is the largest power-of-two batch whose step peaks below the limit, found by doubling.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from step_time import TASKS, Checkpointed, Task, step, with_rounded_inputs
from timing import show
from torch import nn

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp import quant as configs

CHECKPOINT, ROUNDED = "checkpoint, each block", "checkpoint, 2-bit inputs"
VARIANTS = ("plain", "2 bits", "4 bits", "8 bits", CHECKPOINT, ROUNDED)


def resident() -> int:
    """Bytes of the process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def wrap(task: Task, variant: str) -> nn.Module:
    """The model as a variant runs it."""
    if variant == "plain":
        return task.model
    if variant == CHECKPOINT:
        return Checkpointed(task)
    if variant == ROUNDED:
        return with_rounded_inputs(task)
    quantizer = getattr(
        configs, f"ShiftedUint{variant.split()[0]}DynamicActPerBucketFloatStochastic")
    return QuantBackwardWrapper(task.model, quantizer, metadata_dtype=torch.bfloat16)


def worker(name: str, variant: str, batch: int, size: int) -> dict[str, Any]:
    """Measures one variant at one batch size, in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    task = TASKS[name][0](batch, size)
    model, inputs = wrap(task, variant).to(device), task.inputs.to(device)
    # Compiled kernels, gradients and scratch memory are there before anything is measured.
    step(model, inputs[:2])
    before = resident()
    output = model(inputs)
    growth = resident() - before
    output.logsumexp(-1).mean().backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    del output
    with track_saved_memory(model) as report:
        output = model(inputs)
    saved = report.stored_bytes
    del output
    return {"saved": saved, "growth": growth, "peak": peak}


def run(name: str, variant: str, batch: int, size: int) -> dict[str, Any]:
    """:func:`worker` in a process of its own, with a memory allocator that gives memory back."""
    done = subprocess.run(
        [sys.executable, __file__, "--worker", name, variant, str(batch), str(size)],
        capture_output=True, text=True, check=True,
        env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"})
    return json.loads(done.stdout.splitlines()[-1])


def largest_batch(name: str, variant: str, size: int, limit: int) -> int:
    """The largest power of two whose step peaks below ``limit`` bytes."""
    batch = 4
    while batch < 4096 and run(name, variant, 2 * batch, size)["peak"] < limit:
        batch *= 2
    return batch


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        name, variant, batch, size = sys.argv[2:]
        print(json.dumps(worker(name, variant, int(batch), int(size))))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="efficientnet_v2_s", choices=TASKS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--limit", type=int, default=256, help="MiB, for the largest batch")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/memory.json"))
    options = parser.parse_args()
    rows = []
    for variant in VARIANTS:
        found = run(options.model, variant, options.batch, options.size)
        rows.append({
            "variant": variant, "saved MiB": found["saved"] / 2**20,
            "growth MiB": found["growth"] / 2**20, "step peak MiB": found["peak"] / 2**20,
            f"fits {options.limit} MiB": largest_batch(
                options.model, variant, options.size, options.limit * 2**20)})
    show(f"{options.model}, batch {options.batch}, {options.size} px", rows, options.out)


if __name__ == "__main__":
    main()
