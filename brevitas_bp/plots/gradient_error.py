"""Plots bias and noise of gradients, module by module."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from brevitas_bp.allocate import GradientError, GradientErrorRow
from brevitas_bp.drawing import (
    BLUE,
    GREY,
    INK,
    MUTED,
    ORANGE,
    name_modules,
    new_figure,
    shortened,
    tidy,
    written,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_gradient_error(error: GradientError, path: str | Path | None = None) -> Figure:
    """Plots bias and noise of each module's gradient, from input to output, on a logarithmic axis.

    A bias that chance explains is drawn hollow at the bottom. Modules whose gradient is zero up to
    rounding are left out. The title names the largest bias, which has a ring. With several batches, the
    plot also shows the sampling noise.

    Args:
        error: the result of :func:`~brevitas_bp.allocate.measure_gradient_error`.
        path: file to write; the extension chooses the format. None: write no file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no module has a gradient.
    """
    rows = [row for row in error.modules if not row.negligible]
    if not rows:
        raise ValueError(
            "brevitas_bp.plots.plot_gradient_error: at least one module must have a gradient that is "
            "not zero, got none; measure where the loss depends on the parameters")
    figure = new_figure(min(15.0, 6 + 0.06 * len(rows)), 4.6)
    axes = figure.subplots()
    series = {"noise": (BLUE, [row.noise for row in rows])}
    if error.batches > 1:
        series["noise of sampling"] = (GREY, [row.sampling_noise for row in rows])
    series["bias"] = (ORANGE, [row.bias for row in rows])
    floor = _floor([value for _, values in series.values() for value in values])
    for label, (color, values) in series.items():
        _dots(axes, label, color, values, floor)
    largest = _ring_largest(axes, rows)
    name_modules(axes, [row.name for row in rows])
    axes.set_xlim(-1, len(rows))
    _finish(axes, floor, error, largest)
    return written(figure, path)


def _floor(values: list[float]) -> float:
    """Returns a decade below the smallest value that is not zero."""
    positive = [value for value in values if value > 0]
    return 10.0 ** (math.floor(math.log10(min(positive))) - 1) if positive else 1e-6


def _dots(axes: Axes, label: str, color: str, values: list[float], floor: float) -> None:
    """Draws one dot for each layer; zeros are hollow dots at the bottom."""
    shown = {i: value for i, value in enumerate(values) if value > 0}
    zeros = [i for i, value in enumerate(values) if value == 0]
    axes.plot(
        list(shown), list(shown.values()), "o", color=color, markersize=4, label=label, zorder=3)
    if zeros:
        axes.plot(
            zeros, [floor] * len(zeros), "o", color=color, markersize=4, zorder=3, fillstyle="none",
            label=f"{label}: none found", clip_on=False)


def _ring_largest(axes: Axes, rows: list[GradientErrorRow]) -> str:
    """Draws a ring around the largest bias; returns its value and module for the title."""
    i = max(range(len(rows)), key=lambda i: rows[i].bias)
    if rows[i].bias <= 0:
        return ""
    axes.plot([i], [rows[i].bias], "o", color=ORANGE, markersize=9, fillstyle="none", zorder=4)
    (name,) = shortened([rows[i].name or "(root)"])
    return f"; largest bias (ring): {rows[i].bias:.2g}, {name}"


def _finish(axes: Axes, floor: float, error: GradientError, largest: str) -> None:
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor)
    axes.set_ylabel("|error| / |exact gradient|", fontsize=9, color=MUTED)
    axes.set_xlabel("modules, from input to output", fontsize=9, color=MUTED)
    total = error.total
    axes.set_title(
        f"Error of each module's gradient, {error.draws} draws\nwhole network: bias {total.bias:.2g}, "
        f"noise {total.noise:.2g}{largest}", loc="left", fontsize=9, color=INK)
    tidy(axes, "y")
    axes.figure.legend(
        frameon=False, fontsize=8, loc="outside lower right", ncols=5, labelcolor=MUTED)
