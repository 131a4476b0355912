"""The figures: accuracy against distinct integers, and distinct integers against lam."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from summary import Row, groups, mean

INK, MUTED, LIGHT = "#22262b", "#6b7280", "#e5e7eb"
COLORS = {
    "lam": "#2f6db5",
    "MaxBin": "#d9772b",
    "InverseScale": "#4c9a6a",
    "Difference": "#8d5fb0",
}
NAMES = {"lam": "gradient ratio (lam)", "InverseScale": "Inverse"}
#: Start of the runs -> title of their panel, and what the dotted line is.
STARTS = {
    "scratch": ("trained from scratch", "without quantization"),
    "trained": ("trained on with quantization", "before quantization"),
}


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=MUTED)
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)


def _marks(axes: Axes, by: dict[float, list[Row]], label: str, color: str) -> None:
    """Draw a line through the means, and a thin dot for each seed."""
    x = [100 * mean(rows, "accuracy") for rows in by.values()]
    y = [mean(rows, "distinct") for rows in by.values()]
    axes.plot(x, y, "o-", color=color, markersize=5, linewidth=1.2, label=label, zorder=3)
    for rows in by.values():
        axes.plot(
            [100 * row["accuracy"] for row in rows],
            [row["distinct"] for row in rows],
            ".",
            color=color,
            alpha=0.35,
            markersize=4,
            zorder=2,
        )


def draw_pareto(rows: list[Row], path: Path) -> None:
    """Draw accuracy against distinct integers for every way to move scales, in two scenarios."""
    found = groups(rows)
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, (start, (title, line)) in zip(panels, STARTS.items(), strict=True):
        reference: list[float] = []
        for method, color in COLORS.items():
            by = found.get(("fashion-mnist", method, "row", start, False))
            if by:
                _marks(axes, by, NAMES.get(method, method), color)
                reference += [100 * mean(seeds, "float_accuracy") for seeds in by.values()]
        if reference:
            axes.axvline(
                fmean(reference), color=MUTED, linestyle=":", linewidth=1, zorder=1, label=line
            )
        axes.set_yscale("log")
        axes.set_xlabel("test accuracy (%)", fontsize=9, color=MUTED)
        _finish(axes, f"Fashion-MNIST, {title}")
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    panels[0].set_ylabel("distinct integers, all tensors together", fontsize=9, color=MUTED)
    figure.savefig(path, dpi=150)


SERIES = (
    ("digits", "row", False, "digits, row", "#9aa3af"),
    ("fashion-mnist", "row", False, "Fashion-MNIST, row", "#2f6db5"),
    ("fashion-mnist", "column", False, "Fashion-MNIST, column", "#4c9a6a"),
    ("fashion-mnist", "scalar", False, "Fashion-MNIST, scalar", "#d9772b"),
    ("fashion-mnist", "row", True, "Fashion-MNIST, row, 2-bit activations", "#8d5fb0"),
)


def draw_lam(rows: list[Row], path: Path) -> None:
    """Draw distinct integers and accuracy against lam; lam = 0 has its own place on the left."""
    found = groups(rows)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    for dataset, granularity, wrapped, label, color in SERIES:
        by = found.get((dataset, "lam", granularity, "scratch", wrapped))
        if not by:
            continue
        x = [lam or 1e-13 for lam in by]
        for axes, name, factor in zip(panels, ("distinct", "accuracy"), (1, 100), strict=True):
            axes.plot(
                x,
                [factor * mean(seeds, name) for seeds in by.values()],
                "o-",
                color=color,
                markersize=4,
                linewidth=1.2,
                label=label,
            )
    for axes, title in zip(panels, ("Distinct integers", "Test accuracy (%)"), strict=True):
        axes.set_xscale("log")
        ticks = [1e-13, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8]
        names = ["0", *(f"$10^{{{power}}}$" for power in range(-12, -7))]
        axes.set_xticks(ticks, names)
        axes.minorticks_off()
        axes.set_xlabel("lam (Adam's eps = 1e-7)", fontsize=9, color=MUTED)
        _finish(axes, title)
    panels[0].set_yscale("log")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
