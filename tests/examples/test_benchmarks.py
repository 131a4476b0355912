"""The benchmarks run, at sizes too small for meaningful figures, and write what plots.py draws."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.text import Annotation
from torch import Tensor, nn

from brevitas_bp.format import reference
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import NEAREST
from tests.examples.scripts import benchmark

kernels, memory, step_parts, step_time, plots = map(
    benchmark, ("kernels", "memory", "step_parts", "step_time", "plots"))
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


def test_labels_of_steps_cover_nothing() -> None:
    names = list(step_time.variants.EAGER)
    # All points but one lie in a corner, where labels next to their points would overlap.
    rows = [{"model": "net", "variant": name, "x plain": 1 + 0.01 * i, "saved MiB": 10.0 + 0.1 * i}
            for i, name in enumerate(names)]
    rows[-1]["x plain"] = 2.0
    tables = {"step_time": {"title": "", "rows": rows}}
    axes = plots.step_time(tables).axes[0]
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    assert [label.get_text() for label in labels] == names

    def collisions() -> int:
        boxes = [plots.extent(label) for label in labels]
        return sum(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])

    assert collisions() == 0
    for label in labels:
        box = plots.extent(label)
        assert axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1
        label.set_position((7, 0))
        label.set_horizontalalignment("left")
    assert collisions() > 0
