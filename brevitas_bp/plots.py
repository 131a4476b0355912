"""Plots of measurements. matplotlib is imported only when a plot is drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from brevitas_bp.allocate import GradientError, GradientErrorRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _MUTED, _LIGHT = "#22262b", "#6b7280", "#e5e7eb"
_BLUE, _ORANGE, _GREY = "#2f6db5", "#d9772b", "#9aa3af"

# Up to this many layers, the axis names each one; with more, it names groups of layers.
_NAMED = 32


def plot_gradient_error(error: GradientError, path: str | Path | None = None) -> Figure:
    """Plots bias and noise of each module's gradient, from input to output, on a logarithmic axis.

    A bias that chance explains is drawn hollow at the bottom. Modules whose gradient is zero up to
    rounding are left out. The plot names the largest bias. With several batches it also shows the
    sampling noise.

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
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError(
            "brevitas_bp.plots: plots need matplotlib: pip install 'brevitas-bp[plots]'") from missing

    figure = Figure(figsize=(min(15.0, 6 + 0.06 * len(rows)), 4.6), layout="constrained")
    axes = figure.subplots()
    series = {"noise": (_BLUE, [row.noise for row in rows])}
    if error.batches > 1:
        series["noise of sampling"] = (_GREY, [row.sampling_noise for row in rows])
    series["bias"] = (_ORANGE, [row.bias for row in rows])
    floor = _floor([value for _, values in series.values() for value in values])
    for label, (color, values) in series.items():
        _dots(axes, label, color, values, floor)
    _name_largest(axes, rows)
    _name_layers(axes, [row.name for row in rows])
    axes.set_xlim(-1, len(rows))
    _finish(axes, floor, error)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


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


def _name_largest(axes: Axes, rows: list[GradientErrorRow]) -> None:
    i = max(range(len(rows)), key=lambda i: rows[i].bias)
    if rows[i].bias > 0:
        left = i < len(rows) / 2
        axes.annotate(
            f"{rows[i].name or '(root)'}  {rows[i].bias:.2g}", (i, rows[i].bias),
            xytext=(-3 if left else 3, 7), textcoords="offset points", fontsize=8, color=_ORANGE,
            ha="left" if left else "right", zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})


def _name_layers(axes: Axes, names: list[str]) -> None:
    """Labels every layer; if there are many, labels groups of layers and draws lines between them."""
    if len(names) <= _NAMED:
        axes.set_xticks(
            range(len(names)), [name or "(root)" for name in names], rotation=60, ha="right",
            rotation_mode="anchor")
        return
    starts = _groups(names)
    for start in list(starts.values())[1:]:
        axes.axvline(start - 0.5, color=_LIGHT, linewidth=1, zorder=1)
    ends = [*list(starts.values())[1:], len(names)]
    centres: dict[float, str] = {}
    for name, start, end in zip(starts, starts.values(), ends):
        centre = (start + end - 1) / 2
        # Labels of groups that are too close would overlap.
        if not centres or centre - max(centres) >= len(names) / 60:
            centres[centre] = name
    axes.set_xticks(
        list(centres), list(centres.values()), rotation=60, ha="right", rotation_mode="anchor")


def _groups(names: list[str]) -> dict[str, int]:
    """Returns the first index of each group; names are cut at the deepest level with few groups."""
    chosen: dict[str, int] = {}
    for depth in range(1, 1 + max(name.count(".") + 1 for name in names)):
        starts: dict[str, int] = {}
        for i, name in enumerate(names):
            starts.setdefault(".".join(name.split(".")[:depth]) or "(root)", i)
        if chosen and len(starts) > _NAMED:
            break
        chosen = starts
    return chosen


def _finish(axes: Axes, floor: float, error: GradientError) -> None:
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor)
    axes.set_ylabel("relative to the exact gradient", fontsize=9, color=_MUTED)
    total = error.total
    axes.set_title(
        f"Gradient error of each layer, {error.draws} draws (whole network: bias {total.bias:.2g}, "
        f"noise {total.noise:.2g})", loc="left", fontsize=10, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_MUTED, labelsize=8, length=0, which="both")
    axes.grid(axis="y", color=_LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(
        frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1.05), ncols=4,
        labelcolor=_MUTED)
