"""Measures where the time of a wrapped training step goes, with clocks around calls of the library.

    python examples/benchmarks/step_parts.py [--model efficientnet_v2_s] [--bits 2] [--rounds 10]

The time of a call excludes the measured calls inside it. A clock costs about half a microsecond itself.
The figure of a part is the median over the rounds. A rewritten call includes the operation itself, which
a plain step runs as well.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import variants
from networks import TASKS, Task, step
from output import Measured, add_output_options, on_threads, publish
from timing import interleaved
from torch import nn

from brevitas_bp import Packed, QuantBackwardWrapper
from brevitas_bp.backward import attention, hooks, rewrites
from brevitas_bp.backward import location as ops
from brevitas_bp.kernels.cpu import launch as cpu
from brevitas_bp.kernels.cpu import masks as masks_cpu
from brevitas_bp.kernels.cpu import threads


class Clocks:
    """Calls and seconds of functions, for each named part."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self._inside = [0.0]

    def around(
            self, function: Callable[..., Any], part: str | Callable[[Any], str]) -> Callable[..., Any]:
        """Returns ``function`` with a clock; ``part`` is a name, or computes one from the result."""
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self._inside.append(0.0)
            try:
                result = function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                own = elapsed - self._inside.pop()
                self._inside[-1] += elapsed
            name = part if isinstance(part, str) else part(result)
            self.seconds[name] += own
            self.calls[name] += 1
            return result

        return timed


def _packed(result: Any) -> str:
    return "kept tensors" if isinstance(result, hooks.Kept) else "stored tensors, beside kernels"


@contextmanager
def clocked() -> Iterator[Clocks]:
    """Times the calls of the library within the block."""
    clocks = Clocks()
    targets: list[tuple[Any, str, str | Callable[[Any], str]]] = [
        (hooks.ForwardPass, "pack", _packed), (Packed, "decode", "decoding, beside kernels"),
        (rewrites.SaveDerivative, "__call__", "rewritten calls, with the operation"),
        (attention.ReplayAttention, "__call__", "rewritten calls, with the operation"),
        (ops.Location, "enter_module", "hooks of modules"),
        (ops.Location, "leave_module", "hooks of modules"),
        *((module, "launch", "kernels") for module in (cpu, masks_cpu, threads))]
    with ExitStack() as stack:
        for owner, name, part in targets:
            stack.enter_context(
                patch.object(owner, name, clocks.around(getattr(owner, name), part)))
        yield clocks


def parts(model: nn.Module, task: Task, rounds: int) -> list[dict[str, Any]]:
    """Returns calls and milliseconds of each part of a step, forward and backward."""
    taken: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    calls: dict[tuple[str, str], int] = {}
    with clocked() as clocks:
        for _ in range(rounds):
            for when in ("forward", "backward"):
                clocks.seconds.clear()
                clocks.calls.clear()
                if when == "forward":
                    loss = model(task.inputs).float().logsumexp(-1).mean()
                else:
                    loss.backward()
                for part, seconds in clocks.seconds.items():
                    taken[when, part].append(seconds * 1e3)
                    calls[when, part] = clocks.calls[part]
            model.zero_grad()
    return [
        {"what": f"{when}: {part}", "calls": calls[when, part], "ms": statistics.median(ms),
         "us each": statistics.median(ms) * 1e3 / calls[when, part], "x plain": ""}
        for (when, part), ms in taken.items()]


def measure(name: str, bits: int, batch: int | None, size: int, rounds: int) -> list[dict[str, Any]]:
    """Measures steps that are plain, keep everything in hooks, and quantize; then parts of the last."""
    torch.manual_seed(0)
    build, usual = TASKS[name]
    task = build(batch or usual, size)
    ours = variants.ours(task, bits)
    models = {
        "plain": task.model, "hooks that keep everything": QuantBackwardWrapper(
            task.model, policy="exact"), f"ours, {bits} bits": ours}
    seconds = interleaved(
        {key: partial(step, model, task.inputs) for key, model in models.items()}, rounds)
    rows: list[dict[str, Any]] = [
        {"what": f"step: {key}", "calls": "", "ms": s * 1e3, "us each": "",
         "x plain": s / seconds["plain"]} for key, s in seconds.items()]
    return rows + parts(ours, task, rounds)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=list(TASKS), default="efficientnet_v2_s")
    parser.add_argument("--bits", type=int, default=2, choices=(2, 4, 8))
    parser.add_argument("--batch", type=int, help="batch size, the model's own by default")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_output_options(parser, "runs/bench/step_parts.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = measure(options.model, options.bits, options.batch, options.size, options.rounds)
    title = f"Parts of a step of {options.model}, {options.size} px, {on_threads(options.threads)}"
    publish([Measured("step_parts", title, rows)], options)


if __name__ == "__main__":
    main()
