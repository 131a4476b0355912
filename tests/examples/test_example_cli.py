"""The command lines: bad arguments, existing runs, and the files of a good run."""

from __future__ import annotations

import doctest
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import comparison
import demo
import pytest
import quantizers
import recipe
import torch
import train
from faults import InputError
from matplotlib.image import imread
from matplotlib.text import Text
from torch import nn

TINY = ["--limit-train", "48", "--limit-test", "16", "--batch-size", "16", "--epochs", "1"]
TINY += ["--threads", "1", "--no-progress"]


def status_of(out: Path, *words: str) -> int:
    return train.main([*TINY, "--out", str(out), *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quant", "ShiftedUint2DynamicActPerBuckerFloat"], "did you mean"),
        (["--quant", "no.such.module.Quant"], "cannot import"),
        (["--quant-override", "bucket_sise=128"], "bucket_size"),
        (["--quant-override", "bucket_size"], "expected KEY=VALUE"),
        (["--quant-override", "bit_width=9"], "bit_width"),
        (["--quant", "none", "--quant-override", "bit_width=2"], "does nothing with --quant none"),
        (["--quant", "none", "--policy", "exact"], "does nothing with --quant none"),
        (["--dataset", "digit"], "did you mean 'digits'"),
        (["--dataset", "cifar10", "--data-dir", "/nonexistent"], "looked for /nonexistent"),
        (["--batch-size", "0"], "--batch-size: expected a positive number, got 0"),
        (["--lr", "-1"], "--lr: expected a positive number"),
        (["--lr", "nan"], "--lr: expected a positive number"),
        (["--label-smoothing", "1"], "--label-smoothing: expected a number in [0, 1)"),
        (["--warmup-epochs", "2"], "--warmup-epochs: expected 0 .. 1 epochs"),
        (["--batch-size", "4000"], "expected at most 48"),
        (["--stem-stride", "3"], "stem_stride must be 1 or 2"),
        (["--device", "nonsense"], "--device nonsense: cannot be used"),
        (["--resume", "--overwrite"], "not together with --resume"),
        (["--resume"], "no checkpoint to resume"),
    ],
)
def test_bad_arguments_stop_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert status_of(tmp_path / "run", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["--epochs", "one"], ["--model", "resnet"], ["--colour", "red"]])
def test_unparsable_arguments_exit_with_usage(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(words)
    assert stop.value.code == 2


def test_run_leaves_its_files_and_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert status_of(out) == 0
    assert "RotatedNormal2" in capsys.readouterr().out
    names = {
        "checkpoint.pt", "config.json", "gradients.txt", "log.jsonl", "memory.json", "result.json"}
    assert "error |g~ - g| / |g|" in (out / "gradients.txt").read_text()
    assert {path.name for path in out.iterdir()} == names | {"curves.png", "modules.png"}
    row = json.loads((out / "log.jsonl").read_text())
    assert row["stored_bytes"] < row["exact_bytes"] / 4
    rows = json.loads((out / "memory.json").read_text())["rows"]
    assert sum(row["exact_bytes"] for row in rows) > 0
    assert imread(out / "curves.png").std() > 0.01
    assert status_of(out) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert status_of(out, "--resume", "--lr", "0.5") == 2
    assert "lr: saved 0.001, now 0.5" in capsys.readouterr().err
    (out / "notes.txt").write_text("mine")
    assert status_of(out, "--overwrite") == 0
    assert (out / "notes.txt").read_text() == "mine"


def test_interrupted_run_prints_the_command_that_resumes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Trainer, "_step", stopped)
    assert status_of(tmp_path / "run", "--overwrite") == 130
    said = capsys.readouterr().out
    assert "resume with: " in said
    assert said.rstrip().endswith("--resume")
    assert "--overwrite" not in said


def test_channels_last_and_bfloat16_train(tmp_path: Path) -> None:
    assert status_of(tmp_path / "run", "--channels-last", "--amp", "bf16") == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("True", True),
        ("false", False),
        ("none", None),
        ("torch.bfloat16", torch.bfloat16),
        ("float32", torch.float32),
        ("tensor", "tensor"),
        ("'4'", "4"),
        ("(1, 2)", (1, 2)),
    ],
)
def test_overrides_are_typed(text: str, value: Any) -> None:
    parsed = quantizers.parse_overrides([f"key={text}"])
    assert parsed == {"key": value}
    assert type(parsed["key"]) is type(value)


def test_an_override_given_twice_is_refused() -> None:
    with pytest.raises(InputError, match="bit_width was given before"):
        quantizers.parse_overrides(["bit_width=2", "bit_width=4"])


@pytest.mark.parametrize("name", ["Int8ActPerTensorFloat", "brevitas.quant.Int8ActPerTensorFloat"])
def test_stock_quantizers_are_found(name: str) -> None:
    found = quantizers.find_quantizer(name)
    assert found is not None
    assert found.__name__ == "Int8ActPerTensorFloat"


def test_every_demo_quantizer_exists() -> None:
    for variant in demo.VARIANTS.values():
        assert (quantizers.find_quantizer(variant.quant) is None) == (variant.quant == "none")


def factors(kind: recipe.Schedule, warmup: int = 10) -> list[float]:
    rate = recipe.LearningRate(kind, total=100, warmup=warmup)
    return [rate(step) for step in range(100)]


def test_schedules() -> None:
    for kind in ("cosine", "step", "constant"):
        assert factors(kind)[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert factors("constant")[10:] == [1.0] * 90
    assert factors("step")[10:50] == [1.0] * 40
    assert factors("step")[60] == pytest.approx(0.1)
    assert factors("step")[99] == pytest.approx(0.01)
    middle = (1 + math.cos(math.pi / 2)) / 2  # half of the 90 steps after the warm-up
    assert factors("cosine")[55] == pytest.approx(middle)
    cycle = factors("onecycle", warmup=0)
    assert (cycle[0], max(cycle), cycle.index(max(cycle))) == (pytest.approx(1 / 25), 1.0, 30)
    assert cycle[99] < 0.001


def test_norms_and_biases_do_not_decay() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    decayed, kept = recipe.make_optimizer(model, 1e-3, 0.1).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert len(kept["params"]) == 4


DEMO = [*TINY, "--only", "fp32,stochastic-2bit", "--seeds", "0,1"]


def test_demo_compares_and_never_repeats_a_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*DEMO, "--out", str(tmp_path)]
    assert demo.main(words) == 0
    assert "±" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    plain, packed = results["summary"]
    assert plain["ratio"] == 1.0
    assert packed["ratio"] > 4
    assert plain["exact_bytes"] == packed["exact_bytes"]
    assert set(packed["seeds"]) == {"0", "1"}
    assert imread(tmp_path / "comparison.png").std() > 0.01
    assert demo.main(words) == 0
    assert capsys.readouterr().out.count("finished before") == 4
    assert demo.main([*words, "--lr", "0.1"]) == 2
    assert "lr: saved 0.001, now 0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "fp23"], "did you mean 'fp32'"),
        (["--seeds", "0,x"], "expected integers"),
        (["--seeds", "-1"], "--seed: expected 0 or more"),
        (["--epochs", "-1"], "--epochs: expected a positive number"),
    ],
)
def test_bad_demo_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert demo.main([*DEMO, "--out", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [comparison, quantizers])
def test_docstring_examples(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_curve_labels_do_not_overlap() -> None:
    places = comparison.spread_apart([50.0, 90.0, 90.5, 89.0], gap=5.0, top=91.0)
    assert places == [50.0, 85.5, 90.5, 80.5]


def made_up(count: int, label: str, low: float) -> list[comparison.Entry]:
    """Returns runs that end close to each other."""
    entries = []
    for i in range(count):
        stored = 59.3 if i == 0 else 4.0 + i
        result = {
            "accuracy": low + 0.1 * i, "exact_bytes": 59.3 * 2**20, "stored_bytes": stored * 2**20,
            "ratio": 59.3 / stored}
        rows = [{"test_accuracy": low + 0.1 * i - 9 / epoch} for epoch in range(1, 6)]
        entries.append(comparison.Entry(
            f"{label} {i}", "#2f6db5", [comparison.Finished(0, result, rows)]))
    return entries


@pytest.mark.parametrize("count", [1, 4, 9, 12])
@pytest.mark.parametrize("label", ["x", "2-bit per tensor, rounded in every operation"])
@pytest.mark.parametrize("low", [10.0, 95.0])
def test_labels_of_the_comparison_cover_nothing(count: int, label: str, low: float) -> None:
    figure = comparison.plot_comparison(made_up(count, label, low), "net on data", "made up")
    figure.draw_without_rendering()
    curves, bars = figure.axes
    ends = [Text.get_window_extent(text) for text in curves.texts]  # without the lines to the curves
    names, sizes = ([t.get_window_extent() for t in bars.texts[i::2]] for i in (0, 1))
    for boxes in (ends, [*names, *sizes]):
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(text.get_text().split("%")[0].strip() for text in curves.texts)
    assert "MiB" in bars.get_title(loc="left") and "%" in curves.get_title(loc="left")
    assert all(box.y0 > 0 for box in [*ends, *names])
    assert all(box.x1 < bars.bbox.x0 for box in ends)
