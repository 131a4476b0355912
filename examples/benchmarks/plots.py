"""Plots the measurements of kernels.py, step_time.py and memory.py.

    python examples/benchmarks/plots.py [--runs runs/bench] [--figures docs/figures]

Draws each picture whose measurements it finds: kernels.png, libraries.png, step_time.png,
step_time_compiled.png, memory.png.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

INK, MUTED, LIGHT = "#22262b", "#6b7280", "#e5e7eb"
BLUE, ORANGE, GREY = "#2f6db5", "#d9772b", "#9aa3af"
#: Labels are placed in pixels, so pictures are saved at the resolution they were laid out with.
DPI = 130
Rows = list[dict[str, Any]]


def bars(axes: Axes, names: Sequence[str], series: dict[str, tuple[str, Sequence[Any]]]) -> None:
    """Draws horizontal bars, one group per name, the first on top; other cells show their text."""
    height = 0.8 / len(series)
    for i, (label, (color, values)) in enumerate(series.items()):
        places = [row - 0.4 + (i + 0.5) * height for row in range(len(names))]
        numbers = [v if isinstance(v, (int, float)) else 0 for v in values]
        drawn = axes.barh(places, numbers, height * 0.9, color=color, label=label)
        texts = [_short(v) if isinstance(v, (int, float)) else "" for v in values]
        # Give labels an opaque background.
        axes.bar_label(
            drawn, texts, padding=3, fontsize=7, color=MUTED,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    axes.set_yticks(range(len(names)), names, fontsize=8, color=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", color=LIGHT)
    axes.set_axisbelow(True)
    _plain(axes)


def kernels(tables: dict[str, Any]) -> Figure:
    """Plots encode and decode times, divided by memcpy's, on a logarithmic axis."""
    rows: Rows = tables["widths"]["rows"][1:]
    figure = Figure(figsize=(8, 0.8 + 0.38 * len(rows)), layout="constrained", dpi=DPI)
    axes = figure.subplots()
    bars(axes, [row["what"] for row in rows], {
        side: (color, [row[f"{side}, x memcpy"] for row in rows])
        for side, color in (("encode", BLUE), ("decode", ORANGE))})
    _log(axes)
    axes.axvline(1, color=INK, linewidth=0.8)
    times = [row[f"{side}, x memcpy"] for row in rows for side in ("encode", "decode")]
    numbers = [time for time in times if isinstance(time, (int, float))]
    axes.set_xlim(min(numbers) / 2, 2 * max(numbers))
    axes.set_xlabel("time over that of memcpy", fontsize=9, color=INK)
    return _finished(figure, axes, tables["widths"]["title"])


def libraries(tables: dict[str, Any]) -> Figure:
    """Plots nanoseconds per element for each library, one panel per width."""
    rows: Rows = tables["libraries"]["rows"]
    widths = sorted({row["bits"] for row in rows}, reverse=True)
    figure = Figure(figsize=(8, 1 + 0.42 * len(rows)), layout="constrained", dpi=DPI)
    panels = figure.subplots(len(widths), 1, squeeze=False, sharex=True)[:, 0]
    for axes, bits in zip(panels, widths):
        chosen = [row for row in rows if row["bits"] == bits]
        bars(axes, [row["what"] for row in chosen], {
            side: (color, [row[f"{side}, ns/element"] for row in chosen])
            for side, color in (("encode", BLUE), ("decode", ORANGE))})
        _log(axes)
        axes.set_title(f"{bits} bits", fontsize=9, loc="left", color=INK)
    panels[-1].set_xlabel("nanoseconds an element", fontsize=9, color=INK)
    panels[0].set_xlim(right=2 * max(row["encode, ns/element"] for row in rows))
    return _finished(figure, panels[0], tables["libraries"]["title"])


def memory(tables: dict[str, Any]) -> Figure:
    """Plots the memory of each variant, and the largest batch that fits."""
    rows: Rows = tables["memory"]["rows"]
    names = [row["variant"] for row in rows]
    fits = next((key for key in rows[0] if key.startswith("fits ")), None)
    figure = Figure(figsize=(9, 1 + 0.5 * len(rows)), layout="constrained", dpi=DPI)
    panels = figure.subplots(
        1, 2 if fits else 1, squeeze=False, sharey=True,
        width_ratios=(2, 1) if fits else (1,))[0]
    bars(panels[0], names, {
        "saved tensors": (GREY, [row["saved MiB"] for row in rows]),
        "growth over forward": (BLUE, [row["forward MiB"] for row in rows]),
        "growth over the step": (ORANGE, [row["step MiB"] for row in rows])})
    panels[0].set_xlabel("MiB", fontsize=9, color=INK)
    panels[0].margins(x=0.1)
    if fits:
        bars(panels[1], names, {"batch": (BLUE, [row[fits] for row in rows])})
        panels[1].set_xlabel(
            f"largest batch in {fits.removeprefix('fits ')}", fontsize=9, color=INK)
        panels[1].margins(x=0.15)
    return _finished(figure, panels[0], tables["memory"]["title"])


def step_time(tables: dict[str, Any]) -> Figure:
    """Plots time against saved bytes, one panel per network, without the variants that raised."""
    rows: Rows = [row for row in tables["step_time"]["rows"] if row["x plain"] != ""]
    networks = list(dict.fromkeys(row["model"] for row in rows))
    lines = -(-len(networks) // 2)
    figure = Figure(figsize=(10, 0.6 + 3.7 * lines), layout="constrained", dpi=DPI)
    columns = min(2, len(networks))
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, network in zip(panels, networks):
        chosen = [row for row in rows if row["model"] == network]
        _scatter(axes, chosen)
        axes.set_title(network, fontsize=9, loc="left", color=INK)
    for axes in list(panels)[len(networks):]:
        axes.remove()
    figure.suptitle(tables["step_time"]["title"], fontsize=10, x=0.01, ha="left", color=INK)
    figure.supxlabel("saved for backward, MiB", fontsize=9, color=INK)
    figure.supylabel("time of a step over plain", fontsize=9, color=INK)
    # Labels are placed within the final layout, so compute it first.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        place_labels(axes)
    return figure


def _scatter(axes: Axes, rows: Rows) -> None:
    _log(axes)
    for row in rows:
        name, x, y = row["variant"], row["saved MiB"], row["x plain"]
        color = BLUE if name.startswith("ours") else INK if name == "plain" else ORANGE
        axes.plot(x, y, "o", color=color, markersize=6, zorder=4)
        axes.annotate(
            name, (x, y), (0, 0), textcoords="offset points", fontsize=7.5, color=color, va="center",
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.6, "shrinkA": 0, "shrinkB": 5})
    axes.margins(x=0.3, y=0.3)
    axes.grid(color=LIGHT)
    axes.set_axisbelow(True)
    _plain(axes)


def place_labels(axes: Axes) -> None:
    """Moves every label next to its point, where it covers no point, no other label, and no border."""
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    points = [axes.transData.transform(label.xy) for label in labels]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    for label in labels:
        for dx, dy, side in _offsets():
            label.set_position((dx, dy))
            label.set_horizontalalignment(side)
            box = extent(label)
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1
            inside = inside and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(extent(label))


def extent(label: Annotation) -> Bbox:
    """Returns the box of a label's text, in pixels, without its line."""
    return Text.get_window_extent(label)


def _offsets() -> list[tuple[float, float, str]]:
    """Returns places around a point, in points, the nearest first."""
    rises = sorted(range(-90, 91, 6), key=lambda rise: (abs(rise), rise))
    return [(way * (7 + abs(rise) / 4), rise, side)
            for rise in rises for way, side in ((1, "left"), (-1, "right"))]


def _finished(figure: Figure, legend_of: Axes, title: str) -> Figure:
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", color=INK)
    handles, labels = legend_of.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=3, fontsize=8, frameon=False)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=8)


def _log(axes: Axes) -> None:
    """Makes the axis logarithmic, with plain numbers."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter("")


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"


#: Picture -> function that draws it, JSON file that it reads, and table in that file.
FIGURES: dict[str, tuple[Callable[[dict[str, Any]], Figure], str, str]] = {
    "kernels": (kernels, "kernels", "widths"), "libraries": (libraries, "one_thread", "libraries"),
    "step_time": (step_time, "step_time", "step_time"),
    "step_time_compiled": (step_time, "step_time_compiled", "step_time"),
    "memory": (memory, "memory", "memory")}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="JSON files")
    parser.add_argument("--figures", type=Path, default=Path("runs/bench"), help="folder to write to")
    options = parser.parse_args(arguments)
    options.figures.mkdir(parents=True, exist_ok=True)
    for name, (draw, file, needed) in FIGURES.items():
        source = options.runs / f"{file}.json"
        tables = json.loads(source.read_text())["tables"] if source.is_file() else {}
        if needed not in tables:
            print(f"{source}: has no {needed}; {name}.png is not drawn")
            continue
        target = options.figures / f"{name}.png"
        draw(tables).savefig(target)
        print(target)


if __name__ == "__main__":
    main()
