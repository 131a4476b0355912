"""Plots the measurements of kernels.py, step_time.py and memory.py.

    python examples/benchmarks/plots.py [--runs runs/bench] [--figures docs/figures]
    python examples/benchmarks/plots.py --page docs/benchmarks.md --figures docs/figures

Draws each picture whose measurements it finds: kernels.png, libraries.png, step_time.png,
step_time_compiled.png, memory.png. With ``--page`` it draws the two of training steps from the tables of
the page.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from page import tables_of

INK, MUTED, LIGHT = "#22262b", "#6b7280", "#e5e7eb"
BLUE, ORANGE, GREY = "#2f6db5", "#d9772b", "#9aa3af"
DPI = 130
#: Of variants, in their order. Eight colours and nine markers give 72 different pairs.
_COLORS = (INK, BLUE, "#7fb0e6", "#2a8f7b", "#8a5fb0", ORANGE, "#b4413c", GREY)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
Rows = list[dict[str, Any]]


def bars(
        axes: Axes, names: Sequence[str], series: dict[str, tuple[str, Sequence[Any]]],
        digits: int = 2) -> None:
    """Draws horizontal bars, one group per name, the first on top; other cells show their text."""
    height = 0.8 / len(series)
    for i, (label, (color, values)) in enumerate(series.items()):
        places = [row - 0.4 + (i + 0.5) * height for row in range(len(names))]
        numbers = [v if isinstance(v, (int, float)) else 0 for v in values]
        drawn = axes.barh(places, numbers, height * 0.9, color=color, label=label)
        texts = [_short(v, digits) if isinstance(v, (int, float)) else "" for v in values]
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
    """Plots the times and the saved bytes of training steps, without the variants that raised.

    With many variants, each network has a panel with one point for each variant. With two, bars suffice.
    """
    rows: Rows = [row for row in tables["step_time"]["rows"] if row["x plain"] != ""]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    draw = _step_bars if len(variants) <= 2 else _step_points
    return draw(rows, variants, tables["step_time"]["title"])


def _step_bars(rows: Rows, variants: list[str], title: str) -> Figure:
    networks = list(dict.fromkeys(row["model"] for row in rows))
    found = {(row["model"], row["variant"]): row for row in rows}
    figure = Figure(figsize=(9, 1.3 + 0.55 * len(networks)), layout="constrained", dpi=DPI)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (column, label) in zip(panels, (
            ("x plain", "time of a step / plain step"), ("saved MiB", "saved for backward, MiB"))):
        bars(axes, networks, {
            name: (_COLORS[i], [found.get((n, name), {}).get(column, "") for n in networks])
            for i, name in enumerate(variants)}, digits=3)
        axes.set_xlabel(label, fontsize=9, color=INK)
        axes.margins(x=0.15)
    return _finished(figure, panels[0], title)


def _step_points(rows: Rows, variants: list[str], title: str) -> Figure:
    networks = list(dict.fromkeys(row["model"] for row in rows))
    lines = -(-len(networks) // 2)
    figure = Figure(figsize=(10, 1.1 + 3 * lines), layout="constrained", dpi=DPI)
    panels = list(figure.subplots(lines, min(2, len(networks)), squeeze=False).flat)
    for axes, network in zip(panels, networks):
        _points(axes, [row for row in rows if row["model"] == network], variants)
        axes.set_title(network, fontsize=9, loc="left", color=INK)
    for axes in panels[len(networks):]:
        axes.remove()
    handles = {
        str(label): handle for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", color=INK)
    figure.legend(
        [handles[name] for name in variants], variants, loc="outside lower center", ncols=3, fontsize=8,
        frameon=False)
    return figure


def _points(axes: Axes, rows: Rows, variants: list[str]) -> None:
    """Draws one point for each variant; colour and marker tell which."""
    _log(axes)
    for row in rows:
        i = variants.index(row["variant"])
        axes.plot(
            row["saved MiB"], row["x plain"], _MARKERS[i % len(_MARKERS)], linestyle="none",
            color=_COLORS[i % len(_COLORS)], markersize=7, zorder=4, label=row["variant"])
    axes.set_xlabel("saved for backward, MiB", fontsize=8, color=INK)
    axes.set_ylabel("time of a step / plain step", fontsize=8, color=INK)
    axes.margins(x=0.12, y=0.12)
    axes.grid(color=LIGHT)
    axes.set_axisbelow(True)
    _plain(axes)


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
    """Makes the axis logarithmic, with plain numbers at 1, 2 and 5 times powers of ten."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _short(value: float, digits: int) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.{digits}g}"


#: Picture -> function that draws it, JSON file that it reads, and table in that file.
FIGURES: dict[str, tuple[Callable[[dict[str, Any]], Figure], str, str]] = {
    "kernels": (kernels, "kernels", "widths"), "libraries": (libraries, "one_thread", "libraries"),
    "step_time": (step_time, "step_time", "step_time"),
    "step_time_compiled": (step_time, "step_time_compiled", "step_time"),
    "memory": (memory, "memory", "memory")}
#: Picture -> heading of its table on the page, and title.
ON_PAGE = {
    "step_time": (
        "Training step", "A training step, eager, 32 px, 2 threads; stochastic rounding, 2026-11-22"),
    "step_time_compiled": (
        "Compiled training step", "A training step, compiled (inductor), 32 px, 2 threads, 2026-11-22")}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="JSON files")
    parser.add_argument("--figures", type=Path, default=Path("runs/bench"), help="folder to write to")
    parser.add_argument("--page", type=Path, help="page whose tables to draw, in place of --runs")
    options = parser.parse_args(arguments)
    options.figures.mkdir(parents=True, exist_ok=True)
    if options.page is not None:
        found = tables_of(options.page)
        for name, (heading, title) in ON_PAGE.items():
            draw = FIGURES[name][0]
            draw({"step_time": {"title": title, "rows": found[heading][0]}}).savefig(
                target := options.figures / f"{name}.png")
            print(target)
        return
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
