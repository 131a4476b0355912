"""Several quantizers side by side: one table, one figure, one JSON file."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from files import write_json
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import GRID, INK, MUTED, mebibytes, plain_table, tidy
from rich.console import Console


@dataclass(frozen=True)
class Finished:
    """One finished run: its seed, final figures, and test accuracy after each epoch."""

    seed: int
    result: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def curve(self) -> list[float]:
        """Test accuracy in percent after each epoch."""
        return [row["test_accuracy"] for row in self.rows]


@dataclass
class Entry:
    """All seeds of one quantizer."""

    label: str
    color: str
    runs: list[Finished] = field(default_factory=list)

    def mean(self, key: str) -> float:
        """Return the mean of a final figure over the seeds; NaN if a run was too short to be timed."""
        values = [run.result[key] for run in self.runs]
        return float("nan") if None in values else statistics.fmean(values)

    def spread(self, key: str) -> float:
        """Return the sample standard deviation over the seeds, 0 for a single seed."""
        values = [run.result[key] for run in self.runs]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def summary(self) -> dict[str, Any]:
        """Return means, the spread of the accuracy, and the figures of every seed."""
        keys = (
            "accuracy",
            "best_accuracy",
            "exact_bytes",
            "stored_bytes",
            "ratio",
            "seconds_per_step",
        )
        return {
            "label": self.label,
            **{key: self.mean(key) for key in keys},
            "accuracy_spread": self.spread("accuracy"),
            "seeds": {str(run.seed): run.result | {"curve": run.curve} for run in self.runs},
        }


def print_table(entries: Sequence[Entry], title: str) -> None:
    """Print final accuracy, bytes, ratio and time of every quantizer."""
    table = plain_table(title)
    table.add_column("saved tensors")
    for name in ("accuracy", "exact", "stored", "ratio", "s/step"):
        table.add_column(name, justify="right")
    for entry in entries:
        spread = f" ± {entry.spread('accuracy'):.1f}" if len(entry.runs) > 1 else ""
        table.add_row(
            entry.label,
            f"{entry.mean('accuracy'):.1f}{spread} %",
            mebibytes(entry.mean("exact_bytes")),
            mebibytes(entry.mean("stored_bytes")),
            f"{entry.mean('ratio'):.1f}x",
            f"{entry.mean('seconds_per_step'):.3f}",
        )
    Console().print(table)


def write_results(path: Path, entries: Sequence[Entry], settings: dict[str, Any]) -> None:
    """Write everything that the table and the figure show, as JSON."""
    write_json(path, {"settings": settings, "summary": [entry.summary() for entry in entries]})


def plot_comparison(entries: Sequence[Entry], title: str, subtitle: str) -> Figure:
    """Plot accuracy over the epochs on the left, bytes saved for backward on the right."""
    figure = Figure(figsize=(11, max(4.4, 1.6 + 0.31 * len(entries))))
    _plot_curves(figure.add_axes((0.05, 0.12, 0.42, 0.66)), entries)
    _plot_bars(figure.add_axes((0.71, 0.06, 0.265, 0.72)), entries)
    figure.text(0.022, 0.94, title, fontsize=14, color=INK, weight="bold")
    figure.text(0.022, 0.885, subtitle, fontsize=10, color=MUTED)
    return figure


def _plot_curves(axes: Axes, entries: Sequence[Entry]) -> None:
    ends: list[float] = []
    epochs: list[int] = []
    for entry in entries:
        columns = list(zip(*(run.curve for run in entry.runs), strict=True))
        mean = [statistics.fmean(column) for column in columns]
        epochs = list(range(1, len(mean) + 1))
        axes.plot(epochs, mean, color=entry.color, linewidth=2, marker="o", markersize=4, zorder=3)
        if len(entry.runs) > 1:
            spread = [statistics.stdev(column) for column in columns]
            low, high = (
                [m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1)
            )
            axes.fill_between(epochs, low, high, color=entry.color, alpha=0.15, linewidth=0)
        ends.append(mean[-1])
    bottom = axes.get_ylim()[0]
    axes.set_ylim(max(0.0, bottom), min(101.0, max(ends) + 6))
    _label_ends(axes, entries, ends, epochs[-1])
    tidy(axes, "Test accuracy, %")
    axes.set_xticks(epochs if len(epochs) <= 12 else epochs[:: len(epochs) // 10])
    axes.set_xlabel("epoch", fontsize=9, color=MUTED)


def _label_ends(axes: Axes, entries: Sequence[Entry], ends: list[float], epoch: int) -> None:
    """Name each curve at its right end; move labels apart if they would overlap."""
    low, high = axes.get_ylim()
    places = spread_apart(ends, gap=0.062 * (high - low), top=high, bottom=low)
    for entry, end, place in zip(entries, ends, places, strict=True):
        axes.annotate(
            f"{end:.1f} %  {_short(entry.label)}",
            (epoch, end),
            xytext=(1.035, (place - low) / (high - low)),
            textcoords="axes fraction",
            color=entry.color,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": entry.color,
                "alpha": 0.35,
                "linewidth": 0.8,
                "shrinkA": 2,
                "shrinkB": 5,
                "relpos": (0, 0.5),
            },
        )


def _short(label: str) -> str:
    """Return a label that leaves room for the numbers beside it."""
    return shorten(label, 28, placeholder="\u2026")


def spread_apart(
    values: Sequence[float], gap: float, top: float, bottom: float = float("-inf")
) -> list[float]:
    """Return positions close to `values`, in the same order, at least `gap` apart and below `top`.

    They are also above `bottom`, if there is room for all.

    Example:
        >>> spread_apart([1.0, 9.0, 9.0], gap=2.0, top=10.0)
        [1.0, 9.0, 7.0]
        >>> spread_apart([1.0, 1.0, 1.0], gap=2.0, top=10.0, bottom=0.0)
        [4.0, 2.0, 0.0]
    """
    places = list(values)
    above = top + gap
    ordered = sorted(range(len(values)), key=lambda i: (-values[i], i))
    for index in ordered:
        places[index] = min(values[index], above - gap)
        above = places[index]
    below = bottom - gap
    for index in reversed(ordered):
        places[index] = max(places[index], below + gap)
        below = places[index]
    return places


def _plot_bars(axes: Axes, entries: Sequence[Entry]) -> None:
    exact = [entry.mean("exact_bytes") / 2**20 for entry in entries]
    stored = [entry.mean("stored_bytes") / 2**20 for entry in entries]
    rows = list(range(len(entries)))
    axes.barh(rows, exact, height=0.34, color=GRID)
    axes.barh(rows, stored, height=0.34, color=[entry.color for entry in entries])
    for row, entry in enumerate(entries):
        ratio = entry.mean("ratio")
        size = mebibytes(entry.mean("stored_bytes"))
        text = size if ratio < 1.005 else f"{size} ({ratio:.1f}x)"
        # The bytes stand at the right end of the line.
        axes.text(0, row - 0.24, _short(entry.label), color=entry.color, fontsize=9, va="bottom")
        axes.text(max(exact), row - 0.24, text, color=INK, fontsize=9, va="bottom", ha="right")
    axes.set_ylim(len(entries) - 0.7, -0.6)
    axes.set_xlim(0, max(exact))
    tidy(axes, "Saved for backward in one step, MiB", grid="")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
