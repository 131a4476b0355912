"""What learned quantization costs: time of a training step, and bytes saved for backward.

    python examples/learned_quantization/cost.py --markdown

Expected on one core, the largest layer: steps 1.1 to 1.4 times as long as without quantization.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))

from tables import show_table

from brevitas_bp import track_saved_memory
from brevitas_bp.nn.learned import MaxBin, adam, learn_quantization

SIZES = ((784, 128, 32), (1024, 1024, 64), (1024, 1024, 512))
WAYS = ("without quantization", "lam=1e-10", "lam=None, MaxBin")


def stepper(inputs: int, outputs: int, batch: int, way: str) -> tuple[Callable[[], None], float]:
    """Return a function that does one training step, and the MiB that a forward pass saves."""
    torch.manual_seed(0)
    model, x = nn.Linear(inputs, outputs), torch.randn(batch, inputs, requires_grad=True)
    plain = way == WAYS[0]
    if not plain:
        learn_quantization(model, granularity="row", lam=1e-10 if way == WAYS[1] else None)
    optimizer = torch.optim.Adam(model.parameters()) if plain else adam(model, lr=1e-3)
    penalty = MaxBin(1e-10) if way == WAYS[2] else None

    def step() -> None:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if penalty is not None:
            loss = loss + penalty(model)
        loss.backward()
        optimizer.step()

    with track_saved_memory(model) as report:
        kept = model(x)
    del kept
    return step, report.stored_bytes / 2**20


def seconds(step: Callable[[], None]) -> float:
    """Return the seconds of a step, over four steps."""
    start = time.perf_counter()
    for _ in range(4):
        step()
    return (time.perf_counter() - start) / 4


def main() -> None:
    """Measure all ways in turns, so that they share whatever else the machine does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print the table for a page")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = []
    for inputs, outputs, batch in SIZES:
        made = {way: stepper(inputs, outputs, batch, way) for way in WAYS}
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for repeat in range(options.repeats + 1):
            for way, (step, _) in made.items():
                spent = seconds(step)
                if repeat:  # the first turn warms up
                    times[way].append(spent)
        base = min(times[WAYS[0]])
        for way in WAYS:
            best = min(times[way])
            cells.append(
                [
                    f"{inputs} x {outputs}, batch {batch}",
                    way,
                    f"{1000 * best:.2f}",
                    f"{best / base:.2f}",
                    f"{made[way][1]:.2f}",
                ]
            )
    titles = ["layer", "quantization", "ms per step, best of all", "relative", "MiB saved in forward"]
    show_table(titles, cells, options.markdown)


if __name__ == "__main__":
    main()
