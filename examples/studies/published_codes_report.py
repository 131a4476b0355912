"""The table and the figure of ``published_codes.py``."""

import json
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from published_codes_ways import BITS, CODES, UNBIASED
from tables import show_table


@dataclass(frozen=True)
class Result:
    """One network, its inputs stored with one code."""

    model: str
    code: str
    bits: int
    draws: int
    stored_bytes: int
    exact_bytes: int
    error: float
    bias: float
    share: float

    @property
    def ratio(self) -> float:
        """Returns exact bytes divided by stored bytes."""
        return self.exact_bytes / self.stored_bytes

    @property
    def percent(self) -> float:
        """Returns stored bytes in percent of the exact bytes."""
        return 100 / self.ratio


def load(path: Path) -> dict[tuple[str, str, int], Result]:
    """Returns the results of earlier runs."""
    if not path.exists():
        return {}
    results = [Result(**json.loads(line)) for line in path.read_text().splitlines()]
    return {(r.model, r.code, r.bits): r for r in results}


def show(results: dict[tuple[str, str, int], Result], markdown: bool) -> None:
    """Prints a table for each network: ratio, error and bias at each width."""
    for name in dict.fromkeys(model for model, _, _ in results):
        widths = [b for b in BITS if any((name, code, b) in results for code in CODES)]
        cells = []
        for code in CODES:
            found = [results.get((name, code, bits)) for bits in widths]
            if any(found):
                cells.append([code, *(cell for r in found for cell in _cells(r))])
        titles = [name, *(f"{t}, {b} bit" for b in widths for t in ("ratio", "error", "bias"))]
        show_table(titles, cells, markdown, width=150)
        print()


def _cells(r: Result | None) -> list[str]:
    """Returns ratio, error and bias. Nothing can be said of the bias of a gradient that is all noise."""
    if r is None:
        return ["-"] * 3
    return [f"{r.ratio:.1f}", _short(r.error), _short(r.bias) if r.error < LARGEST else "?"]


def _short(number: float) -> str:
    """Returns about two digits."""
    return "0" if number < 5e-4 else f"{number:.3f}" if number < 0.1 else f"{number:.2f}" if (
        number < 10) else f"{number:.0f}" if number < 1000 else f"{number:.0e}"


INK, MUTED, LIGHT = "#22262b", "#6b7280", "#e5e7eb"
COLORS = (
    "#9aa3af", "#6b7280", "#b58900", "#7a5c00", "#2f6db5", "#17becf", "#8c564b", "#e377c2", "#d62728",
    "#2ca02c", "#ff7f0e", "#9467bd", "#a8326e", "#c7a6e8", "#1a9988", "#111111")
MARKERS = "os^vDPX<>*hpdH8s"
#: Largest error that is drawn.
LARGEST = 30


def draw(results: dict[tuple[str, str, int], Result], models: list[str], path: Path) -> None:
    """Draws error over bytes, one panel for each network; codes with a bias have hollow marks."""
    models = [name for name in models if any(r.model == name for r in results.values())]
    if not models:
        print("nothing is measured yet, so there is nothing to draw")
        return
    figure = Figure(figsize=(11.5, 8.2), dpi=130, layout="constrained")
    panels = figure.subplots(2, -(-len(models) // 2), squeeze=False).flat
    for axes, name in zip(panels, models):
        for code, color, marker in zip(CODES, COLORS, MARKERS):
            found = [results[name, code, b] for b in BITS if (name, code, b) in results]
            default = code == "rotated (default)"
            axes.plot(
                [r.percent for r in found], [r.error for r in found], color=color, marker=marker,
                markersize=5.5, linewidth=2 if default else 1, label=code, zorder=4 if default else 3,
                fillstyle="full" if code in UNBIASED else "none")
        axes.axhline(1, color=MUTED, linewidth=0.8, linestyle=":", zorder=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        errors = [r.error for r in results.values() if r.model == name]
        # Beyond the top, a gradient is noise; lines that leave the panel show that there is more.
        axes.set_ylim(min(errors) / 2, min(max(errors) * 2, LARGEST))
        ticks = [3, 5, 7, 10, 15, 20, 30]
        low, high = axes.get_xlim()
        axes.set_xticks([t for t in ticks if low <= t <= high])
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g} %")
        axes.set_title(name, fontsize=10, loc="left", color=INK)
        axes.grid(color=LIGHT, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, colors=MUTED, length=0, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        f"bytes saved for backward, in percent of plain autograd's (errors above {LARGEST} not drawn)",
        fontsize=9, color=INK)
    figure.supylabel("squared error of the gradient, relative to its square", fontsize=9, color=INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside right center", fontsize=8, frameon=False, labelcolor=INK,
        title="filled: unbiased\nhollow: biased", title_fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"wrote {path}")
