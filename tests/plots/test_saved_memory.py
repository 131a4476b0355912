"""The picture of a report shows the report's numbers, with one group and with hundreds."""

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from brevitas_bp import QuantBackwardWrapper, SavedMemoryReport, track_saved_memory
from brevitas_bp.memory_tables import SavedMemoryTable, grouped
from brevitas_bp.plots import plot_saved_memory


def report_of(layers: int) -> SavedMemoryReport:
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.SiLU()) for _ in range(layers)]
    model = QuantBackwardWrapper(nn.Sequential(*blocks), seed=0)
    with track_saved_memory(model) as report:
        kept = model(torch.randn(256, 64))
    del kept
    return report


def table_of(count: int, top: int | None = None) -> SavedMemoryTable:
    """Returns a table of modules with long names."""
    counted = {
        (f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.default", "linear", "float32", ""):
        [1, (1 + i % 7) * 2**20, (1 + i % 7) * 2**17] for i in range(count)}
    return grouped(counted, ("module",), top)


def labels(figure: Figure) -> list[str]:
    return [tick.get_text() for tick in figure.axes[0].get_yticklabels()]


def widths(figure: Figure) -> list[list[float]]:
    """Returns the widths of the bars of each series, in MiB."""
    return [[bar.get_width() for bar in bars] for bars in figure.axes[0].containers]  # pyright: ignore


@pytest.mark.parametrize("by", ["module", "op", "dtype", "reason"])
def test_bars_are_the_groups_of_the_report(by: str) -> None:
    report = report_of(3)
    figure = report.plot(by=by)
    table = report.by(by)
    exact, stored = widths(figure)
    assert exact == [g.exact_bytes / 2**20 for g in table.groups]
    assert stored == [g.stored_bytes / 2**20 for g in table.groups]
    assert figure.axes[0].get_xlabel() == "MiB"
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told[0] == f"plain autograd: {report.exact_bytes / 2**20:.2f} MiB"
    assert told[1] == f"stored: {report.stored_bytes / 2**20:.2f} MiB ({report.ratio:.1f}x)"


def test_what_top_leaves_out_is_one_bar() -> None:
    report = report_of(6)
    figure = report.plot(top=3)
    assert labels(figure)[-1] == "other: 9 more" and len(labels(figure)) == 4
    exact, stored = widths(figure)
    assert sum(exact) * 2**20 == report.exact_bytes and sum(stored) * 2**20 == report.stored_bytes


@pytest.mark.parametrize("count", [1, 2, 40, 500])
def test_labels_lie_apart_and_inside(count: int) -> None:
    for top in (None, 20) if count < 500 else (None,):
        figure = plot_saved_memory(table_of(count, top))
        figure.draw_without_rendering()
        names = [tick.get_window_extent() for tick in figure.axes[0].get_yticklabels()]
        assert all(a.y0 >= b.y1 for a, b in itertools.pairwise(names))
        assert all(box.x0 >= 0 for box in names)
        whole = figure.bbox
        texts = [text.get_window_extent() for text in figure.axes[0].texts]
        assert len(texts) == len(names)
        assert all(box.x1 <= whole.x1 for box in texts)
        assert max(len(label) for label in labels(figure)) <= 40


def test_groups_by_two_columns_have_both_names() -> None:
    report = report_of(2)
    figure = plot_saved_memory(report.by("op", "module", top=3))
    assert labels(figure)[-1] == "other: 1 more"
    assert all(", " in label for label in labels(figure)[:3])
    assert figure.axes[0].get_title(loc="left") == "Saved for backward, by op and module"


def test_a_rest_many_times_larger_is_cut_off_and_says_so() -> None:
    figure = plot_saved_memory(table_of(500, 5))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [text.endswith("(bar cut off)") for text in texts] == [False] * 5 + [True]
    assert figure.axes[0].get_xlim()[1] < 20


def test_a_step_of_a_loop_is_drawn_too() -> None:
    model = QuantBackwardWrapper(nn.Sequential(nn.Linear(64, 64)), seed=0)
    with track_saved_memory(model) as report:
        model(torch.randn(256, 64)).sum().backward()
    with pytest.raises(ValueError, match=r"at least one saved tensor.*plot report\.last_step"):
        report.plot()
    assert report.last_step is not None
    assert labels(report.last_step.plot()) == ["0"]


def test_a_file_is_written_without_pyplot(tmp_path: Path) -> None:
    path = tmp_path / "memory.png"
    assert isinstance(report_of(1).plot(path=path), Figure)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    report: Any = report_of(1)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.plot()
