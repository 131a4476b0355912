"""Memory of a training step: bytes saved, growth of the process, and the largest batch that fits.

    python examples/benchmarks/memory.py [--model efficientnet_v2_s] [--batch 64] [--limit 256]

Each measurement runs in a process of its own, once under ``python -m brevitas_bp.run`` and once on the
allocator of the system ("default"). "forward" is the growth of the resident set from before a forward
pass to its end, with the output alive, the largest of all steps; "step" that of its peak (on CUDA the
allocator's); "ms" the middle one of the times of a step. "fits" is the largest batch whose steps peak
below the limit, and the smallest that was seen not to: they are less than a 16th apart. ``--limit 0``
does not look for it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from largest_batch import largest_batch
from networks import MORE_TASKS, step
from output import Measured, add_output_options, publish
from variants import EAGER, saved_bytes

#: What save_on_cpu keeps takes the same memory here.
VARIANTS = [key for key in EAGER if key != "save_on_cpu" or torch.cuda.is_available()]


def resident() -> int:
    """Bytes of the process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def worker(
        name: str, variant: str, batch: int, size: int, steps: int, count: bool) -> dict[str, float]:
    """Measures one variant at one batch size, in this process; ``count`` also counts saved bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    task = MORE_TASKS[name][0](batch, size)
    model, inputs = EAGER[variant](task).to(device), task.inputs.to(device)
    # Compiled kernels, gradients and scratch memory are there before anything is measured.
    step(model, inputs[:2])
    before = resident()
    growth, seconds = 0, []
    for _ in range(steps):
        start = time.perf_counter()
        output = model(inputs)
        growth = max(growth, resident() - before)
        output.logsumexp(-1).mean().backward()
        seconds.append(time.perf_counter() - start)
        del output
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    found = {"growth": growth, "peak": peak, "seconds": median(seconds)}
    if count:
        found["saved"] = saved_bytes(model, inputs)
    return found


def run(
        name: str, variant: str, batch: int, size: int, *, steps: int = 1, count: bool = False,
        launched: bool = True) -> dict[str, float]:
    """:func:`worker` in a process of its own, under an allocator that gives memory back or not."""
    print(f"{variant}, batch {batch}{'' if launched else ', default allocator'}", file=sys.stderr)
    launcher = ["-m", "brevitas_bp.run"] if launched else ["-W", "ignore::UserWarning"]
    done = subprocess.run(
        [sys.executable, *launcher, __file__, "--worker", name, variant,
         *(str(int(number)) for number in (batch, size, steps, count))],
        stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(options: argparse.Namespace, variant: str) -> dict[str, Any]:
    """What one variant takes, and the largest batch it allows."""
    name, size = options.model, options.size
    found, default = (
        run(name, variant, options.batch, size, steps=options.steps, count=launched, launched=launched)
        for launched in (True, False))
    cells: dict[str, Any] = {"variant": variant, "saved MiB": found["saved"] / 2**20}
    for prefix, measured in (("", found), ("default: ", default)):
        cells |= {
            f"{prefix}forward MiB": measured["growth"] / 2**20,
            f"{prefix}step MiB": measured["peak"] / 2**20, f"{prefix}ms": measured["seconds"] * 1e3}
    if not options.limit:
        return cells
    largest = largest_batch(
        lambda batch: run(name, variant, batch, size, steps=2)["peak"], options.limit * 2**20,
        {options.batch: found["peak"]}, most=options.probes)
    return {**cells, f"fits {options.limit} MiB": largest.fits,
            "does not": largest.too_large or "not found", "probes": largest.probes}


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--worker"]:
        name, variant, *numbers = arguments[1:]
        batch, size, steps, count = map(int, numbers)
        print(json.dumps(worker(name, variant, batch, size, steps, bool(count))))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="efficientnet_v2_s", choices=MORE_TASKS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--steps", type=int, default=20, help="of each measurement")
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
