"""Memory of a training step: bytes saved, growth of the process, and the largest batch that fits.

    python examples/benchmarks/memory.py [--model efficientnet_v2_s] [--batch 64] [--limit 256]

Each measurement runs in its own process, once under ``python -m brevitas_bp.run`` and once with the
system allocator ("default: ...").

- "saved": bytes saved for backward.
- "forward": growth of the resident set from before a forward pass to its end, with the output alive; the
  largest of all steps.
- "step": growth of the peak of the resident set; on CUDA, the peak of the allocator.
- "ms": median time of a step.
- "fits": largest batch whose steps peak below the limit. "does not": smallest batch known to exceed it.
  The two differ by less than a 16th. ``--limit 0`` skips this search.
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

#: On the CPU, save_on_cpu keeps saved tensors in the same memory, so it is measured on CUDA only.
VARIANTS = [key for key in EAGER if key != "save_on_cpu" or torch.cuda.is_available()]


def resident() -> int:
    """Returns the bytes of the process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def worker(
        name: str, variant: str, batch: int, size: int, steps: int, count: bool) -> dict[str, float]:
    """Measures one variant at one batch size, in this process; ``count`` also counts saved bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    task = MORE_TASKS[name][0](batch, size)
    model, inputs = EAGER[variant](task).to(device), task.inputs.to(device)
    # Compile kernels and allocate gradients and scratch memory before measuring.
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
    """Runs :func:`worker` in its own process, with ``brevitas_bp.run`` or the default allocator."""
    print(f"{variant}, batch {batch}{'' if launched else ', default allocator'}", file=sys.stderr)
    launcher = ["-m", "brevitas_bp.run"] if launched else ["-W", "ignore::UserWarning"]
    done = subprocess.run(
        [sys.executable, *launcher, __file__, "--worker", name, variant,
         *(str(int(number)) for number in (batch, size, steps, count))],
        stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(options: argparse.Namespace, variant: str) -> dict[str, Any]:
    """Measures the memory of one variant, and the largest batch it allows."""
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
    parser.add_argument("--steps", type=int, default=20, help="number of steps of each measurement")
    parser.add_argument("--limit", type=int, default=256, help="MiB, for the largest batch; 0 skips it")
    parser.add_argument("--probes", type=int, default=8, help="most probes for the largest batch")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS, help="variants")
    add_output_options(parser, "runs/bench/memory.json")
    options = parser.parse_args(arguments)
    rows = [row(options, variant) for variant in VARIANTS if variant in options.only]
    title = f"Memory of a step: {options.model}, batch {options.batch}, {options.size} px"
    publish([Measured("memory", title, rows)], options)


if __name__ == "__main__":
    main()
