"""Plots show the numbers that they get."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from brevitas_bp.allocate import GradientError, GradientErrorRow
from brevitas_bp.plots import plot_gradient_error


def row(name: str, *, bias: float, noise: float, **options: Any) -> GradientErrorRow:
    """Returns a row for a gradient of size 2."""
    values = {"cosine": 0.9, "sampling_variance": None, "negligible": False, **options}
    return GradientErrorRow(name, 10, 2.0, (2 * noise) ** 2, 4 * bias * abs(bias), 0.0, **values)


def error_of(modules: list[GradientErrorRow], batches: int = 1) -> GradientError:
    return GradientError(8, batches, modules, modules, row("total", bias=0.1, noise=1.0))


def series(figure: Figure) -> dict[str, tuple[Any, Any]]:
    """Returns label -> positions of its dots."""
    return {
        str(line.get_label()): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
        for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")}


def test_dots_are_the_rows_of_the_modules() -> None:
    rows = [
        row("stem", bias=0.02, noise=0.5), row("dead", bias=1.0, noise=9.0, negligible=True),
        row("middle", bias=-0.01, noise=0.25), row("head", bias=0.3, noise=0.0)]
    figure = plot_gradient_error(error_of(rows))
    drawn = series(figure)
    assert drawn["noise"][0].tolist() == [0, 1]
    assert drawn["noise"][1] == pytest.approx([0.5, 0.25])
    assert drawn["bias"][0].tolist() == [0, 2]
    assert drawn["bias"][1] == pytest.approx([0.02, 0.3])
    # If chance explains the bias, or nothing is rounded, the dot is below everything, not left out.
    for label, place in (("bias: none found", 1), ("noise: none found", 2)):
        assert drawn[label][0].tolist() == [place]
        assert drawn[label][1] < 0.02
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["stem", "middle", "head"]
    assert axes.get_title(loc="left").endswith("; largest bias (ring): 0.3, head")
    ring = axes.lines[-1]
    assert (np.asarray(ring.get_xdata()).tolist(), ring.get_fillstyle()) == ([2], "none")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_tightbbox())


def test_sampling_is_drawn_where_there_are_batches() -> None:
    rows = [row("a", bias=0.1, noise=0.5, sampling_variance=1.0)]
    assert series(plot_gradient_error(error_of(rows, batches=3)))["noise of sampling"][1] == [0.5]
    assert "noise of sampling" not in series(plot_gradient_error(error_of(rows)))


def test_many_layers_are_named_by_groups() -> None:
    names = ["stem.conv"] + [f"stage{i}.{j}.conv{k}" for i in range(4) for j in range(5)
                             for k in range(8)] + ["head"]
    figure = plot_gradient_error(error_of([row(n, bias=0.1, noise=1.0) for n in names]))
    assert len(series(figure)["noise"][0]) == len(names) == 162
    labels = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    # Stages have 20 blocks. With stem and head, they are few enough to be named one by one.
    assert labels == ["stem.conv", *(f"stage{i}.{j}" for i in range(4) for j in range(5)), "head"]
    figure.draw_without_rendering()
    boxes = [tick.get_window_extent() for tick in figure.axes[0].get_xticklabels()]
    assert all(a.x1 < b.x1 for a, b in itertools.pairwise(boxes))


def test_names_that_would_lie_over_each_other_are_left_out() -> None:
    names = ["a", "b"] + [f"stage.{i}" for i in range(150)]
    figure = plot_gradient_error(error_of([row(n, bias=0.1, noise=1.0) for n in names]))
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["a", "stage"]


def test_written_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "error.png"
    plot_gradient_error(error_of([row("", bias=0.1, noise=1.0)]), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one module must have a gradient"):
        plot_gradient_error(error_of([row("a", bias=1.0, noise=1.0, negligible=True)]))
