"""Times a training step: plain, wrapped, checkpointed, offloaded; in turns, in one run.

    python examples/benchmarks/step_time.py [--model efficientnet_v2_s gpt] [--batch 32] [--rounds 5]
    python examples/benchmarks/step_time.py --compiled --out runs/bench/step_time_compiled.json

Every variant runs one step (forward, loss, backward) on the same batch. "x plain" is the ratio of the
smallest times. Saved bytes are those of live tensors. A variant that raises has no figures.

- Models: efficientnet_v2_s (CIFAR stem), resnet50, vit (four blocks of width 256), gpt (four blocks of
  width 256), or "every".
- ``--only`` names variants, for instance ``--only plain "ours, 2 bits"``.
- ``--compiled`` measures the network compiled with torch.compile, alone and in wrappers. Compiling takes
  minutes.
"""

import argparse
import sys
import time
from functools import partial
from typing import Any

import torch
import variants
from networks import TASKS, step
from output import Measured, add_output_options, on_threads, publish
from timing import interleaved
from torch import Tensor, nn

#: torch.compile compiles a module again for each wrapper around it.
_RECOMPILATIONS = 64


def first_step(name: str, model: nn.Module, inputs: Tensor) -> str:
    """Runs one step, which compiles; returns a word for the error it raised, or an empty string."""
    start = time.perf_counter()
    try:
        step(model, inputs)
    except Exception as error:
        print(f"{name}: {error}", file=sys.stderr)
        return type(error).__name__
    finally:
        print(f"{name}: first step {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return ""


def measure(
        name: str, chosen: dict[str, variants.Variant], batch: int | None, size: int,
        rounds: int) -> list[dict[str, Any]]:
    """Returns one row per way to keep saved tensors; the others are compared with the first."""
    torch.manual_seed(0)
    build, usual = TASKS[name]
    task = build(batch or usual, size)
    models = {key: variant(task) for key, variant in chosen.items()}
    failed = {key: first_step(f"{name}, {key}", model, task.inputs) for key, model in models.items()}
    steps = {key: partial(step, models[key], task.inputs) for key in models if not failed[key]}
    seconds = interleaved(steps, rounds)
    saved = {key: variants.saved_bytes(models[key], task.inputs) for key in steps}
    reference = next(iter(models))
    rows = []
    for key in models:
        row: dict[str, Any] = {"model": f"{name}, batch {len(task.inputs)}", "variant": key}
        if failed[key]:
            rows.append({**row, "ms": failed[key], "x plain": "", "saved MiB": "", "bytes ratio": ""})
            continue
        known = reference in seconds
        rows.append({
            **row, "ms": seconds[key] * 1e3,
            "x plain": seconds[key] / seconds[reference] if known else "",
            "saved MiB": saved[key] / 2**20,
            "bytes ratio": saved[reference] / saved[key] if known else ""})
    return rows


def select(
        available: dict[str, variants.Variant],
        only: list[str] | None) -> dict[str, variants.Variant]:
    """Returns the named variants and "plain", in the order of ``available``."""
    unknown = set(only or ()) - set(available)
    if unknown:
        raise SystemExit(f"--only: expected some of {list(available)}, got {sorted(unknown)}")
    return {key: v for key, v in available.items() if only is None or key in (*only, "plain")}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", default=["efficientnet_v2_s"],
                        choices=[*TASKS, "every"])
    parser.add_argument("--only", nargs="+", help="variants to measure, besides plain")
    parser.add_argument("--batch", type=int, help="batch size, the model's own by default")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compiled", action="store_true", help="compile the networks")
    parser.add_argument("--backend", default="inductor", help="of --compiled")
    add_output_options(parser, "runs/bench/step_time.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = _RECOMPILATIONS
    available = variants.compiled_variants(options.backend) if options.compiled else variants.EAGER
    chosen = select(available, options.only)
    names = list(TASKS) if "every" in options.model else options.model
    rows = []
    for name in names:
        rows += measure(name, chosen, options.batch, options.size, options.rounds)
        torch._dynamo.reset()
    how = f"compiled ({options.backend})" if options.compiled else "eager"
    title = f"A training step, {how}, {options.size} px, {on_threads(options.threads)}"
    publish([Measured("step_time", title, rows)], options)


if __name__ == "__main__":
    main()
