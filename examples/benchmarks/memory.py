"""Memory of a training step: bytes saved, growth of the process, and the largest batch that fits.

    python examples/benchmarks/memory.py [--model efficientnet_v2_s] [--batch 64] [--limit 256]

Each measurement runs in a process of its own. "forward" is the growth of the resident set from before
the forward pass to its end, with the output alive; "step" that of its peak over the whole step (on CUDA
the allocator's peak). "fits" is the largest batch whose step peaks below the limit, and the smallest
that was seen not to: they are less than a 16th apart. ``--limit 0`` does not look for it.
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
from largest_batch import largest_batch
from networks import TASKS, step
from output import Measured, add_output_options, publish
from variants import EAGER, saved_bytes

#: What save_on_cpu keeps takes the same memory here.
VARIANTS = [key for key in EAGER if key != "save_on_cpu" or torch.cuda.is_available()]


def resident() -> int:
    """Bytes of the process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def worker(name: str, variant: str, batch: int, size: int, count: bool) -> dict[str, int]:
    """Measures one variant at one batch size, in this process; ``count`` also counts saved bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    task = TASKS[name][0](batch, size)
    model, inputs = EAGER[variant](task).to(device), task.inputs.to(device)
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
    found = {"growth": growth, "peak": peak}
    if count:
        found["saved"] = saved_bytes(model, inputs)
    return found


def run(name: str, variant: str, batch: int, size: int, *, count: bool = False) -> dict[str, int]:
    """:func:`worker` in a process of its own, with a memory allocator that gives memory back."""
    print(f"{variant}, batch {batch}", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, __file__, "--worker", name, variant, str(batch), str(size), str(int(count))],
        stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"})
    return json.loads(done.stdout.splitlines()[-1])


def row(options: argparse.Namespace, variant: str) -> dict[str, Any]:
    """What one variant takes, and the largest batch it allows."""
    name, size = options.model, options.size
    found = run(name, variant, options.batch, size, count=True)
    cells = {
        "variant": variant, "saved MiB": found["saved"] / 2**20,
        "forward MiB": found["growth"] / 2**20, "step MiB": found["peak"] / 2**20}
    if not options.limit:
        return cells
    largest = largest_batch(
        lambda batch: run(name, variant, batch, size)["peak"], options.limit * 2**20,
        {options.batch: found["peak"]}, most=options.probes)
    return {**cells, f"fits {options.limit} MiB": largest.fits,
            "does not": largest.too_large or "not found", "probes": largest.probes}


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--worker"]:
        name, variant, *numbers = arguments[1:]
        batch, size, count = map(int, numbers)
        print(json.dumps(worker(name, variant, batch, size, bool(count))))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="efficientnet_v2_s", choices=TASKS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--limit", type=int, default=256, help="MiB, for the largest batch; 0: none")
    parser.add_argument("--probes", type=int, default=8, help="most, for the largest batch")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS, help="variants")
    add_output_options(parser, "runs/bench/memory.json")
    options = parser.parse_args(arguments)
    rows = [row(options, variant) for variant in VARIANTS if variant in options.only]
    title = f"Memory of a step: {options.model}, batch {options.batch}, {options.size} px"
    publish([Measured("memory", title, rows)], options)


if __name__ == "__main__":
    main()
