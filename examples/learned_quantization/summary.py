"""Means over seeds, and the tables."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))

from tables import show_table

Row = dict[str, Any]
Key = tuple[str, str, str, str, bool]


def groups(rows: list[Row]) -> dict[Key, dict[float, list[Row]]]:
    """Return (data set, method, granularity, start, wrapped) -> lam or gamma -> rows of all seeds."""
    found: dict[Key, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        run = row["run"]
        key = (
            run["setting"]["dataset"],
            run["method"],
            run["granularity"],
            run["start"],
            run["wrapped"],
        )
        found[key][run["strength"]].append(row)
    return {key: dict(sorted(by.items())) for key, by in found.items()}


def mean(rows: list[Row], name: str) -> float:
    """Return the mean of a figure over seeds."""
    return fmean(row[name] for row in rows)


def spread(rows: list[Row], name: str) -> str:
    """Return "a to b" over seeds, or "a" if all are equal."""
    values = [row[name] for row in rows]
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def accuracy(rows: list[Row]) -> str:
    """Return the mean accuracy over seeds, and the range if there are several."""
    values = [100 * row["accuracy"] for row in rows]
    between = f" ({min(values):.1f} to {max(values):.1f})" if len(rows) > 1 else ""
    return f"{fmean(values):.1f} %{between}"


def summary(rows: list[Row], markdown: bool) -> None:
    """Print one line for each way and strength, the mean of all seeds."""
    titles = [
        "data",
        "start",
        "scales move by",
        "granularity",
        "strength",
        "accuracy",
        "float",
        "distinct integers",
        "bits",
        "zipped KiB (floats)",
        "seeds",
    ]
    cells = []
    for (dataset, method, granularity, start, wrapped), by in groups(rows).items():
        for strength, seeds in by.items():
            cells.append(
                [
                    dataset,
                    start,
                    method + (", 2-bit activations" if wrapped else ""),
                    granularity,
                    f"{strength:g}",
                    accuracy(seeds),
                    f"{100 * mean(seeds, 'float_accuracy'):.1f} %",
                    spread(seeds, "distinct"),
                    spread(seeds, "bits"),
                    f"{mean(seeds, 'zipped_integers') / 1024:.1f} "
                    f"({mean(seeds, 'zipped_floats') / 1024:.1f})",
                    str(len(seeds)),
                ]
            )
    show_table(titles, cells, markdown, width=180)
