"""The picture of a plan shows the plan's numbers, with one tensor and with hundreds."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from brevitas_bp.allocate import BitPlan
from brevitas_bp.allocate.plan import PlannedTensor
from brevitas_bp.plots import plot_plan

CHOICES = ["2avg8", "1", "2", "rotated 3", "4", "8", "exact", "2@64"]
BITS = [0.25, 1, 2, 3, 4, 8, 32, 2]
REACHES = ["weight", "sum", "norm", "all"]


def plan_of(count: int, name: str = "model.layers.{}.attention.output.dense") -> BitPlan:
    tensors = []
    for i in range(count):
        chosen, elements = CHOICES[i % 8], 2**18
        stored = 4.0 * elements if chosen == "exact" else elements * BITS[i % 8] / 8 + 1024
        tensors.append(PlannedTensor(
            (f"{name.format(i)}:linear:argument 0",), elements, 4 * elements, REACHES[i % 4],
            {chosen: (stored, 1e-4)}, chosen))
    exact = sum(t.exact_bytes for t in tensors) + 2**20
    return BitPlan(tuple(tensors), 2**19, exact, 1.0, "empirical", "optimal", 9, 1.0)


def dots(figure: Figure) -> dict[int, float]:
    """Returns position -> bits of each tensor."""
    found: dict[int, float] = {}
    for line in figure.axes[0].lines:
        found |= dict(zip(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()))
    return found


def test_bits_and_bytes_are_those_of_the_plan() -> None:
    plan = plan_of(16)
    figure = plot_plan(plan, budget="12%")
    bits, sizes, whole = figure.axes
    assert dots(figure) == dict(enumerate(BITS * 2))
    exact, stored = ([bar.get_height() for bar in bars] for bars in sizes.containers)  # pyright: ignore
    assert exact == [1.0] * 16
    assert stored == [t.stored_bytes / 2**20 for t in plan.tensors]
    fixed, planned = (bars[0].get_width() for bars in whole.containers)  # pyright: ignore
    assert (fixed, fixed + planned) == (0.5, pytest.approx(plan.stored_bytes / 2**20))
    (line,) = whole.lines
    assert np.asarray(line.get_xdata())[0] == pytest.approx(0.12 * plan.exact_bytes / 2**20, abs=1e-6)
    assert "budget 2.04 MiB (line)" in whole.get_title(loc="left")
    assert bits.get_ylabel() == "bits of each code"
    assert (sizes.get_ylabel(), whole.get_xlabel()) == ("MiB of each tensor", "MiB")
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "kept exact" in told and len(set(told)) == len(told) == 7


@pytest.mark.parametrize("count", [1, 2, 32, 33, 500])
@pytest.mark.parametrize("name", ["{}", "model.layers.{}.attention.output.dense"])
def test_labels_lie_apart_and_inside(count: int, name: str) -> None:
    figure = plot_plan(plan_of(count, name), budget="20%")
    figure.draw_without_rendering()
    ticks = figure.axes[1].get_xticklabels()
    boxes = [tick.get_window_extent() for tick in ticks]
    assert boxes and all(a.x1 < b.x1 for a, b in itertools.pairwise(boxes))
    assert len(boxes) > 8 or count <= 8
    assert all(box.y0 >= 0 for box in boxes)
    for axes in figure.axes:
        box = axes.title.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and axes.get_title(loc="left") is not None
    drawn = figure.axes[0].get_position()
    assert drawn.height > 0.2  # names leave room for the picture
    assert len(dots(figure)) == count


def test_without_a_budget_there_is_no_line(tmp_path: Path) -> None:
    figure = plot_plan(plan_of(8), path=tmp_path / "plan.svg")
    assert not figure.axes[2].lines and "budget" not in figure.axes[2].get_title(loc="left")
    assert (tmp_path / "plan.svg").stat().st_size > 1000


@pytest.mark.parametrize(("count", "budget", "told"), [
    (0, None, "at least one tensor"), (4, "2X", "such as 400_000_000")])
def test_what_cannot_be_drawn_is_refused(count: int, budget: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        plot_plan(plan_of(count), budget)
