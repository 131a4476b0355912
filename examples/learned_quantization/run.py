"""Trains networks with learned quantization; writes a table and two figures.

    python examples/learned_quantization/run.py --data-dir data/fashion-mnist --out runs/learned

Without `--data-dir`, only scikit-learn's digits are used. Every finished run is a line of
`results.jsonl`: kill the program and start it again, and it goes on. Expected on one core: 12 to 15
minutes for three seeds; on Fashion-MNIST, 90 distinct integers in place of 20,000 for about one point
of accuracy, if quantization starts after training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "efficientnet_v2"))

from faults import InputError
from figures import draw_lam, draw_pareto
from files import append_json_line, write_atomically
from plan import DIGITS, FASHION, Run, plan
from summary import summary
from training import FloatNetworks, images, train


class Results:
    """The finished runs, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self.rows.append(json.loads(line))
                except ValueError:
                    # The line that a killed program was writing.
                    print(f"{path}: drops an unfinished line")
            text = "".join(json.dumps(row) + "\n" for row in self.rows)
            write_atomically(path, lambda file: file.write(text.encode()))

    def holds(self, run: Run) -> bool:
        """Return whether the run is finished."""
        return any(row["run"] == run.identity() for row in self.rows)

    def of(self, runs: Iterable[Run]) -> list[dict[str, Any]]:
        """Return the rows of these runs."""
        wanted = [run.identity() for run in runs]
        return [row for row in self.rows if row["run"] in wanted]

    def add(self, run: Run, measured: dict[str, Any]) -> None:
        """Append a finished run."""
        row = {"run": run.identity(), **measured, "torch": torch.__version__}
        append_json_line(self.path, row)
        self.rows.append(row)


def with_progress(runs: list[Run]) -> Iterator[Run]:
    """Yield the runs behind a progress bar, or a line each if rich is not installed."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    except ImportError:
        for number, run in enumerate(runs, 1):
            print(f"{number}/{len(runs)} {run}", flush=True)
            yield run
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=len(runs))
        for run in runs:
            progress.update(task, description=str(run))
            yield run
            progress.advance(task)


def main(arguments: list[str] | None = None) -> int:
    """Do the runs that are missing, then print the tables and draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with the files of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("runs/learned"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="start no run after this time")
    parser.add_argument("--limit", type=int, help="stop after so many runs")
    parser.add_argument("--markdown", action="store_true", help="print the tables for a page")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = [DIGITS] if options.data_dir is None else [DIGITS, FASHION]
    runs = plan(settings, options.seeds)
    folder = options.data_dir or Path()
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "results.jsonl")
    floats, end = FloatNetworks(folder), time.monotonic() + (options.seconds or float("inf"))
    try:
        for setting in settings:
            images(setting, folder)
        for run in with_progress([run for run in runs if not results.holds(run)][: options.limit]):
            if time.monotonic() > end:
                break
            results.add(run, train(run, folder, floats))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    rows = results.of(runs)
    summary(rows, options.markdown)
    draw_lam(rows, options.out / "learned_lam.png")
    if options.data_dir is not None:
        draw_pareto(rows, options.out / "learned_pareto.png")
    print(f"{len(rows)} of {len(runs)} runs; figures and results.jsonl are in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
