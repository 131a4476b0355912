"""Output of a run: a progress bar, a final table, and two plots."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from trainer import Progress as TrainingProgress

INK = "#22262b"
MUTED = "#6b7280"
GRID = "#e5e7eb"
BLUE = "#2f6db5"
ORANGE = "#d9772b"
LIGHT = "#c3cad3"


def mebibytes(count: float) -> str:
    """Format bytes as a short text."""
    value = count / 2**20
    return f"{value:.0f} MiB" if value >= 100 else f"{value:.2f} MiB"


class StepBar:
    """A progress bar for the current epoch; silent if `visible` is false."""

    def __init__(self, visible: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        self._visible = visible
        self._bar = Progress(*columns, disable=not visible, transient=True)
        self._task = self._bar.add_task("", total=None, loss="")

    def __enter__(self) -> StepBar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def step(self, progress: TrainingProgress, epochs: int, steps: int) -> None:
        """Show the position in the epoch."""
        self._bar.update(
            self._task,
            description=f"epoch {progress.epoch + 1}/{epochs}",
            completed=progress.step,
            total=steps,
            loss=f"loss {progress.loss_sum / progress.step:.3f}",
        )

    def epoch(self, row: dict[str, Any]) -> None:
        """Print the line of a finished epoch."""
        if self._visible:
            self._bar.console.print(
                f"epoch {row['epoch']:3d}  loss {row['train_loss']:.3f}, test "
                f"{row['test_loss']:.3f}  accuracy {row['test_accuracy']:5.1f} %  saved "
                f"{mebibytes(row['stored_bytes'])} of {mebibytes(row['exact_bytes'])}",
                highlight=False,
                soft_wrap=True,
            )


def print_result(result: dict[str, Any], folder: Path) -> None:
    """Print the final table of one run."""
    config = result["config"]
    title = f"{config['model']} on {Path(config['dataset']).name}\nquantizer: {config['quant']}"
    table = plain_table(title)
    for name in ("accuracy", "best", "exact", "stored", "ratio", "s/step"):
        table.add_column(name, justify="right")
    table.add_row(*figures(result))
    Console().print(table)
    print(f"written to {folder}")


def plain_table(title: str) -> Table:
    """Return a table of 80 columns without vertical rules."""
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def figures(result: dict[str, Any]) -> list[str]:
    """Return accuracies, bytes, ratio and time of a result, formatted for a table."""
    seconds = result["seconds_per_step"]
    return [
        f"{result['accuracy']:.1f} %",
        f"{result['best_accuracy']:.1f} %",
        mebibytes(result["exact_bytes"]),
        mebibytes(result["stored_bytes"]),
        f"{result['ratio']:.1f}x",
        "-" if seconds is None else f"{seconds:.3f}",
    ]


def tidy(axes: Axes, title: str, *, grid: str = "y") -> None:
    """Apply the common look: left-aligned title, light spines, a light grid behind the data."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LIGHT)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]


def write_run_plots(folder: Path, rows: list[dict[str, Any]], memory: dict[str, Any]) -> None:
    """Write `curves.png` and `modules.png` of one run."""
    plot_curves(rows).savefig(folder / "curves.png", dpi=150)
    plot_modules(memory).savefig(folder / "modules.png", dpi=150)


def plot_curves(rows: list[dict[str, Any]]) -> Figure:
    """Plot loss and accuracy over the epochs."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    for key, color, style in (("train_loss", LIGHT, "-"), ("test_loss", BLUE, "-")):
        values = [float("nan") if row[key] is None else row[key] for row in rows]
        left.plot(epochs, values, style, color=color, linewidth=2, marker="o", markersize=3)
        left.annotate(
            key.replace("_", " "),
            (epochs[-1], values[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            color=color if color != LIGHT else MUTED,
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
    accuracy = [row["test_accuracy"] for row in rows]
    right.plot(epochs, accuracy, color=BLUE, linewidth=2, marker="o", markersize=3)
    tidy(left, "Loss")
    tidy(right, f"Test accuracy, % (last {accuracy[-1]:.1f})")
    for axes in (left, right):
        axes.set_xlabel("epoch", fontsize=9, color=MUTED)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def plot_modules(memory: dict[str, Any], top: int = 15) -> Figure:
    """Plot exact and stored bytes of the `top` modules that save most."""
    totals: dict[str, list[int]] = {}
    for row in memory["rows"]:
        pair = totals.setdefault(row["module"] or "(model)", [0, 0])
        pair[0] += row["exact_bytes"]
        pair[1] += row["stored_bytes"]
    shown = sorted(totals.items(), key=lambda item: item[1][0])[-top:]
    figure = Figure(figsize=(8, 1.3 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    names = [name for name, _ in shown]
    for index, (label, color) in enumerate((("exact", LIGHT), ("stored", BLUE))):
        widths = [pair[index] / 2**20 for _, pair in shown]
        axes.barh(names, widths, height=0.74 - 0.36 * index, color=color, label=label)
    tidy(axes, f"Bytes saved for backward, MiB: the {len(shown)} largest modules", grid="x")
    axes.spines["left"].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right", labelcolor=MUTED)
    return figure
