"""The picture of a report: where the bytes of plain autograd were, and where the stored bytes are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from brevitas_bp.drawing import BLUE, INK, LIGHT, MUTED, PALE, new_figure, shortened, tidy, written
from brevitas_bp.memory_tables import SavedMemoryGroup, SavedMemoryTable, ratio_text
from brevitas_bp.text import short_mib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEIGHT = 0.8
_STORED = 0.42
_LONGEST_OTHER = 1.6
#: Inches; matplotlib draws at most 65,535 pixels.
_TALLEST = 200


def plot_saved_memory(shown: SavedMemoryTable, path: str | Path | None = None) -> Figure:
    """Draws a bar of exact bytes for each group of saved tensors, and within it one of stored bytes.

    The first group is on top. Groups that the table left out are one bar, "other", at the bottom.

    Args:
        shown: groups, from ``report.by("module", top=20)``.
        path: file to write; the extension chooses the format. None: write no file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the table has no group.
    """
    groups = [*shown.groups, *([] if shown.rest is None else [shown.rest])]
    if not groups:
        raise ValueError(
            "brevitas_bp.SavedMemoryReport.plot: at least one saved tensor is needed, got none; keep "
            "the output of the model until the block ends; after a training loop, plot report.last_step")
    names = shortened([_name(group) or "(root)" for group in shown.groups])
    names += [] if shown.rest is None else [f"other: {_name(shown.rest)}"]
    figure = new_figure(8.5, min(_TALLEST, 1.5 + 0.27 * len(groups)))
    axes = figure.subplots()
    exact = [group.exact_bytes / 2**20 for group in groups]
    stored = [group.stored_bytes / 2**20 for group in groups]
    places = range(len(groups))
    total, kept = sum(g.exact_bytes for g in groups), sum(g.stored_bytes for g in groups)
    axes.barh(
        places, exact, _HEIGHT, color=PALE, label=f"plain autograd: {short_mib(total)}")
    axes.barh(
        places, stored, _STORED, color=BLUE,
        label=f"stored: {short_mib(kept)} ({_times(total, kept)})")
    ends = [max(pair) for pair in zip(exact, stored)]
    # The rest may be many times larger than any bar with a name. Its bar then ends early.
    end = min(max(ends), _LONGEST_OTHER * max(ends[:len(shown.groups)]))
    for place, group in zip(places, groups):
        cut = "" if ends[place] <= end else " (bar cut off)"
        numbers = axes.annotate(
            _numbers(group) + cut, (min(ends[place], end), place), xytext=(4, 0),
            textcoords="offset points", fontsize=7.5, color=MUTED, va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
        # The layout need not look at hundreds of texts: the axes leave room for them.
        numbers.set_in_layout(False)
    # Room for the numbers at the right of the longest bar.
    axes.set_xlim(0, 1.4 * end or 1.0)
    _finish(axes, names, f"Saved for backward, by {' and '.join(shown.columns)}")
    return written(figure, path)


def _name(group: SavedMemoryGroup) -> str:
    """Returns the values that the group's tensors share; the rest has one value that is not blank."""
    return ", ".join(value for value in group.values.values() if value.strip())


def _numbers(group: SavedMemoryGroup) -> str:
    """Returns stored bytes, exact bytes and ratio of a group."""
    stored = short_mib(group.stored_bytes).removesuffix(" MiB")
    return (
        f"{stored} of {short_mib(group.exact_bytes)}, "
        f"{_times(group.exact_bytes, group.stored_bytes)}")


def _times(exact: int, stored: int) -> str:
    ratio = ratio_text(exact, stored)
    return ratio if ratio in ("shared", "-") else f"{float(ratio):.1f}x"


def _finish(axes: Axes, names: list[str], title: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlabel("MiB", fontsize=9, color=MUTED)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    tidy(axes, "x")
    axes.tick_params(axis="y", labelcolor=INK)
    axes.spines["left"].set_color(LIGHT)
    axes.figure.legend(
        frameon=False, fontsize=8, loc="outside lower right", ncols=2, labelcolor=MUTED)
