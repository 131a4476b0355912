"""What the pictures have in common: colours, axes, names of many modules.

matplotlib is imported only when a picture is drawn. Figures are made without pyplot, so they need no
display and leave no state behind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, LIGHT = "#22262b", "#6b7280", "#e5e7eb"
BLUE, ORANGE, GREY, GREEN, RED = "#2f6db5", "#d9772b", "#9aa3af", "#2a8f7b", "#b4413c"
#: Of what plain autograd keeps; the grid must not shine through.
PALE = "#c9ced6"

#: Up to this many modules, an axis names each one; with more, it names groups of modules.
NAMED = 32
#: Longer names are shortened, beside a picture and below it.
LONGEST = 36
_LONGEST_BELOW = 26


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure; sizes are in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError(
            "brevitas_bp.plots: plots need matplotlib: pip install 'brevitas-bp[plots]'") from missing
    return Figure(figsize=(width, height), layout="constrained")


def written(figure: Figure, path: str | Path | None) -> Figure:
    """Writes a figure to a file, if there is one, and returns it."""
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def tidy(axes: Axes, grid: str) -> None:
    """Gives axes the common look, with a light grid along ``grid``: "x" or "y"."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=MUTED, labelsize=8, length=0, which="both")
    axes.grid(axis="x" if grid == "x" else "y", color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)


def shortened(names: Sequence[str], longest: int = LONGEST) -> list[str]:
    """Returns names without their first parts, if they are long; different names stay different.

    >>> shortened(["head", "model.encoder.layers.11.attention.output.dense"], longest=24)
    ['head', '\u2026attention.output.dense']
    """
    kept = [_parts_that_fit(name, longest) for name in names]
    parts = [name.split(".") for name in names]
    while True:
        short = [
            name if count >= len(own) else "\u2026" + ".".join(own[-count:])
            for name, own, count in zip(names, parts, kept)]
        # Equal names are equal from the start.
        different = Counter(text for text, _ in {*zip(short, names)})
        alike = [i for i, text in enumerate(short) if different[text] > 1 and kept[i] < len(parts[i])]
        if not alike:
            return short
        for i in alike:
            kept[i] += 1


def _parts_that_fit(name: str, longest: int) -> int:
    """Returns how many parts at the end of a name to keep: all, or at least one."""
    if len(name) <= longest:
        return name.count(".") + 1
    kept, length = 0, 1
    for part in reversed(name.split(".")):
        length += len(part) + (kept > 0)
        if kept and length > longest:
            break
        kept += 1
    return kept


def name_modules(axes: Axes, names: Sequence[str]) -> None:
    """Labels the x axis: every module, or, if there are many, groups with lines between them."""
    if len(names) <= NAMED:
        shown = shortened([name or "(root)" for name in names], _LONGEST_BELOW)
        axes.set_xticks(
            range(len(names)), shown, rotation=60, ha="right", rotation_mode="anchor")
        return
    starts = _groups(names)
    for start in list(starts.values())[1:]:
        axes.axvline(start - 0.5, color=LIGHT, linewidth=1, zorder=1)
    ends = [*list(starts.values())[1:], len(names)]
    centres: dict[float, str] = {}
    for name, start, end in zip(starts, starts.values(), ends):
        centre = (start + end - 1) / 2
        # Labels of groups that are too close would overlap.
        if not centres or centre - max(centres) >= len(names) / 60:
            centres[centre] = name
    axes.set_xticks(
        list(centres), shortened(list(centres.values()), _LONGEST_BELOW), rotation=60, ha="right",
        rotation_mode="anchor")


def _groups(names: Sequence[str]) -> dict[str, int]:
    """Returns the first index of each group; names are cut at the deepest level with few groups.

    If that would be one group, it returns some of the groups of the next level.
    """
    chosen: dict[str, int] = {}
    for depth in range(1, 1 + max(name.count(".") + 1 for name in names)):
        starts: dict[str, int] = {}
        for i, name in enumerate(names):
            starts.setdefault(".".join(name.split(".")[:depth]) or "(root)", i)
        if len(starts) > NAMED:
            if len(chosen) > 1:
                break
            return dict(list(starts.items())[::-(-len(starts) // NAMED)])
        chosen = starts
    return chosen
