"""The benchmarks run, at sizes too small for meaningful figures, and write what plots.py draws."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp.format import reference
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import NEAREST
from tests.examples.scripts import benchmark

kernels, memory, step_parts, step_time, plots, tracking = map(
    benchmark, ("kernels", "memory", "step_parts", "step_time", "plots", "tracking"))
libraries = kernels.libraries

QUICK = ["--threads", "1", "--seconds", "0.001"]


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that runs in no time."""
    def task(batch: int, size: int) -> Any:
        model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        return sys.modules["networks"].Task(model, torch.randn(batch, 64), [model])

    for tasks in (step_time.TASKS, memory.MORE_TASKS):
        monkeypatch.setitem(tasks, "tiny", (task, 256))


def tables_of(out: Path) -> dict[str, Any]:
    measured = json.loads(out.read_text())
    assert {"date", "commit", "threads", "torch"} <= measured["machine"].keys()
    return {key: table["rows"] for key, table in measured["tables"].items()}


def draw(out: Path) -> list[str]:
    plots.main(["--runs", str(out.parent), "--figures", str(out.parent)])
    return sorted(picture.name for picture in out.parent.glob("*.png"))


def stand_in(bits: int) -> Any:
    """A replacement for another library: the reference, to nearest, with one byte per code."""
    spec = BucketQuantSpec(bits, libraries.BUCKET, rounding=NEAREST)

    def decode(encoded: Any) -> Tensor:
        codes, numel = encoded
        return reference.decode(codes, spec, 0, numel, torch.float32)

    return libraries.Rival(
        "stand-in", bits, lambda x: (reference.encode(x, spec, 0), x.numel()), decode,
        lambda encoded: encoded[0].tensors)


def test_no_script_hides_a_package() -> None:
    assert importlib.util.find_spec("kernels") is None


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(libraries, "rivals", lambda: [stand_in(8), stand_in(4)])
    out = tmp_path / "kernels.json"
    kernels.main([*QUICK, "--mib", "1", "--out", str(out), "--markdown"])
    tables = tables_of(out)
    assert list(tables) == list(kernels.TABLES)
    ratios = {row["what"]: row["bytes ratio"] for row in tables["widths"]}
    # A bucket of 256: 64 bytes of codes and 8 of metadata, for 1024 bytes of floats.
    assert ratios[kernels.USUAL] == 1024 / 72
    assert {row["dtype"] for row in tables["codecs"]} == {"float32", "float16", "bfloat16", "bool"}
    exact, few = (next(row for row in tables["codecs"] if row["what"] == name)
                  for name in ("ReLU mask, 1 bit, exact", "2 bits for means of 4"))
    assert (exact["bytes ratio"], few["bytes ratio"]) == (32, 4 * 1024 / 72)
    assert all(row["us"] > 0 for row in tables["small"] if "hooks" not in row["what"])
    assert "| what | encode, ns/element |" in capsys.readouterr().out
    out.with_name("one_thread.json").write_text(out.read_text())
    assert draw(out) == ["kernels.png", "libraries.png"]


def test_libraries_are_compared_at_equal_bits() -> None:
    rows = libraries.compare(torch.randn(4096), [stand_in(8), stand_in(4)], rounds=1)
    assert [row["bits"] for row in rows] == [8, 8, 8, 4, 4, 4]
    for stochastic, nearest, other in (rows[:3], rows[3:]):
        assert nearest["bytes ratio"] == other["bytes ratio"]
        assert nearest["RMS error"] == other["RMS error"] < stochastic["RMS error"]
        for column, rival in (("ours encodes, x faster", stochastic), ("to nearest", nearest)):
            ratio = other["encode, ns/element"] / rival["encode, ns/element"]
            assert other[column] == pytest.approx(ratio)
            assert rival[column] == ""


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in ("bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, name, None)
    assert libraries.rivals() == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("pip install" in line for line in lines)


@pytest.mark.usefixtures("tiny")
def test_step_time_has_every_variant(tmp_path: Path) -> None:
    out = tmp_path / "step_time.json"
    step_time.main(["--model", "tiny", "--rounds", "1", "--threads", "1", "--out", str(out)])
    rows = {row["variant"]: row for row in tables_of(out)["step_time"]}
    assert list(rows) == list(step_time.variants.EAGER)
    # The input, and the input and output of GELU: 256 x 64 floats each.
    assert rows["plain"]["saved MiB"] == rows["save_on_cpu"]["saved MiB"] == 3 * 256 * 64 * 4 / 2**20
    assert rows["ours, 2 bits, policy all"]["bytes ratio"] > 12
    assert draw(out) == ["step_time.png"]


@pytest.mark.usefixtures("tiny")
def test_parts_of_a_step(tmp_path: Path) -> None:
    out, pack = tmp_path / "step_parts.json", step_parts.hooks.ForwardPass.pack
    step_parts.main(["--model", "tiny", "--rounds", "1", "--threads", "1", "--out", str(out)])
    rows = {row["what"]: row for row in tables_of(out)["step_parts"]}
    assert rows["step: plain"]["x plain"] == 1
    # Forward stores the inputs of both layers and the derivative. It keeps the second layer's weight.
    for part in ("forward: stored tensors, beside kernels", "forward: kernels", "backward: kernels"):
        assert rows[part]["calls"] == 3
    assert rows["forward: kept tensors"]["calls"] == 1
    assert rows["forward: rewritten calls, with the operation"]["calls"] == 1
    assert all(row["ms"] > 0 for row in rows.values())
    assert step_parts.hooks.ForwardPass.pack is pack


@pytest.mark.usefixtures("tiny")
@pytest.mark.filterwarnings("ignore:.*compiled graph saves tensors:UserWarning")
def test_compiled_step(tmp_path: Path) -> None:
    out = tmp_path / "step_time_compiled.json"
    words = ["--model", "tiny", "--rounds", "1", "--threads", "1", "--out", str(out), "--compiled"]
    step_time.main([*words, "--backend", "aot_eager", "--only", "ours, 2 bits, policy all"])
    plain, ours = tables_of(out)["step_time"]
    assert (plain["variant"], ours["variant"]) == ("plain", "ours, 2 bits, policy all")
    assert plain["saved MiB"] > 10 * ours["saved MiB"] > 0
    assert draw(out) == ["step_time_compiled.png"]


@pytest.mark.usefixtures("tiny")
def test_variant_that_raises_has_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no step")

    monkeypatch.setitem(step_time.variants.EAGER, "broken", lambda task: Broken())
    out = tmp_path / "step_time.json"
    step_time.main(["--model", "tiny", "--rounds", "1", "--only", "broken", "--out", str(out)])
    rows = tables_of(out)["step_time"]
    assert [row["ms"] for row in rows if row["variant"] == "broken"] == ["RuntimeError"]
    assert draw(out) == ["step_time.png"]


def test_unknown_variant_stops_before_any_work() -> None:
    with pytest.raises(SystemExit, match="expected some of"):
        step_time.main(["--only", "ours, 3 bits"])


@pytest.mark.usefixtures("tiny")
def test_memory_counts_and_searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(
            name: str, variant: str, batch: int, size: int, *, steps: int = 1, count: bool = False,
            launched: bool = True) -> dict[str, float]:
        found = memory.worker(name, variant, batch, size, steps, count)
        # Within one process, the peak includes earlier tests. A straight line replaces it here.
        return {**found, "peak": batch * (2**20 if variant == "plain" else 2**18)}

    monkeypatch.setattr(memory, "run", run)
    out = tmp_path / "memory.json"
    memory.main(["--model", "tiny", "--batch", "64", "--limit", "32", "--out", str(out),
                 "--only", "plain", "ours, 2 bits"])
    plain, ours = tables_of(out)["memory"]
    assert (plain["fits 32 MiB"], ours["fits 32 MiB"]) == (32, 128)
    assert plain["default: ms"] > 0 and ours["default: forward MiB"] >= 0
    assert plain["saved MiB"] > 4 * ours["saved MiB"] > 0
    assert draw(out) == ["memory.png"]


def test_memory_worker_is_a_process_of_its_own() -> None:
    for launched in (True, False):
        found = memory.run("gpt", "plain", 2, 2, steps=2, launched=launched)
        assert found["peak"] >= found["growth"] >= 0 < found["seconds"]


@pytest.mark.usefixtures("tiny")
def test_tracking(tmp_path: Path) -> None:
    out = tmp_path / "tracking.json"
    tracking.main(["--model", "tiny", "--rounds", "1", "--threads", "1", "--out", str(out)])
    (row,) = tables_of(out)["tracking"]
    assert row["saved tensors"] == 5  # two inputs, a derivative, and two tensors of the loss
    assert row["tracked, ms"] > 0 and row["summary"].startswith("saved ")


def steps_of(variants: list[str], networks: int = 3) -> dict[str, Any]:
    rows = [
        {"model": f"net{n}", "variant": name, "x plain": 1 + 0.01 * i, "saved MiB": 10.0 + 90 * i}
        for n in range(networks) for i, name in enumerate(variants)]
    return {"step_time": {"title": "made up", "rows": rows}}


def test_every_variant_of_a_step_has_its_own_mark_in_the_legend() -> None:
    names = list(step_time.variants.EAGER)
    figure = plots.step_time(steps_of(names))
    figure.draw_without_rendering()
    axes = figure.axes
    assert len(axes) == 3
    marks = [(line.get_color(), line.get_marker()) for line in axes[0].lines]
    assert len(set(marks)) == len(marks) == len(names)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    assert [(h.get_color(), h.get_marker()) for h in legend.legend_handles] == marks
    for panel in axes:
        assert panel.get_xlabel() == "saved for backward, MiB"
        assert panel.get_ylabel() == "time of a step / plain step"
        ticks = [float(t.get_text()) for t in panel.get_xticklabels() if t.get_text()]
        low, high = panel.get_xlim()
        assert len([t for t in ticks if low <= t <= high]) >= 3
        assert not panel.get_tightbbox().overlaps(legend.get_window_extent())


def test_two_variants_of_a_step_are_bars() -> None:
    times, sizes = plots.step_time(steps_of(["plain", "ours, 2 bits"])).axes
    assert [[bar.get_width() for bar in bars] for bars in times.containers] == [[1.0] * 3, [1.01] * 3]
    assert [[bar.get_width() for bar in bars] for bars in sizes.containers] == [[10.0] * 3, [100.0] * 3]
    assert (times.get_xlabel(), sizes.get_xlabel()) == (
        "time of a step / plain step", "saved for backward, MiB")


def test_pictures_of_steps_are_drawn_from_the_page(tmp_path: Path, capsys: Any) -> None:
    page = Path(__file__).parents[2] / "docs/benchmarks.md"
    plots.main(["--page", str(page), "--figures", str(tmp_path)])
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_time.png", "step_time_compiled.png"]
    rows = plots.tables_of(page)["Compiled training step"][0]
    assert rows[1] == {
        "model": "vit, batch 64", "variant": "ours, 2 bits", "ms": 531, "x plain": 1.03,
        "saved MiB": 38.6, "bytes ratio": 6.88}
