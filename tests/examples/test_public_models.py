"""The study of published models: its counts, files and tables, on models that run in no time."""

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

STUDIES = Path(__file__).parents[2] / "examples" / "studies"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Imports the script."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(STUDIES))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module = importlib.import_module("public_models")
    yield module
    torch.set_num_threads(threads)


@pytest.fixture
def in_process(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents forks: autograd has run in this process, and does not survive a fork."""
    monkeypatch.setattr(study, "measure_apart", study.measure_model)


class Counting(nn.Module):
    """A module that never gives the same result twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


def networks() -> dict[str, nn.Module]:
    return {
        "usual": nn.Sequential(
            nn.Linear(8, 256), nn.BatchNorm1d(256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 8)),
        "linear": nn.Linear(8, 8),
        "frozen": nn.Linear(8, 8).requires_grad_(False),
        "zero": nn.Sequential(nn.Linear(8, 8), nn.Threshold(1e9, 0.0)),
        "counting": Counting(),
        "large": nn.Linear(8, 200),
        "narrow": nn.Linear(4, 8),
    }


@pytest.fixture
def own(study: ModuleType, in_process: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The study with one more source, of the networks above."""
    subject = importlib.import_module("public_models_subject")

    def build(name: str, most_parameters: int, std: float) -> Any:
        inputs = (torch.randn(64, 8, generator=torch.Generator().manual_seed(0)),)
        most = 1000 if name == "large" else most_parameters
        return subject.finish(lambda: networks()[name], lambda _: [inputs], most, std)

    source = ModuleType("own_source")
    vars(source).update(names=lambda: list(networks()), build=build)
    monkeypatch.setitem(sys.modules, "own_source", source)
    monkeypatch.setitem(study.SOURCES, "own", ("own_source", "names", "build"))
    return study


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in map(json.loads, out.read_text().splitlines())}


def test_every_model_is_in_the_table_or_named(own: ModuleType, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "models.jsonl"
    words = ["--sources", "own", "--out", str(out), "--markdown"]
    own.main([*words, "--minutes", "0"])
    assert not out.exists()
    own.main(words)
    rows = rows_of(out)
    assert {name: row["status"] for name, row in rows.items()} == {
        "own/usual": "measured", "own/linear": "measured", "own/frozen": "no gradient",
        "own/zero": "no gradient", "own/counting": "plain model not reproducible",
        "own/large": "too large", "own/narrow": "no inputs fit"}
    usual = rows["own/usual"]
    assert usual["differs"] == [] and usual["inputs"] == "0 64x8"
    assert 0 < usual["error_8"] < usual["error_2"] / 10
    assert usual["exact_bytes"] > 4 * usual["stored_bytes"] > 0
    assert usual["worst"] in dict(networks()["usual"].named_parameters())
    printed = capsys.readouterr().out
    assert "| own | 2 | " in printed and f"| own/usual | {usual['error_2']:.3g} | " in printed
    assert "no gradient: 2 (frozen, zero)." in printed
    assert "Not bit-identical" not in printed
    # A second run measures nothing again.
    own.main(words)
    assert len(out.read_text().splitlines()) == len(rows)
    assert capsys.readouterr().out == printed


def test_two_files_side_by_side(own: ModuleType, tmp_path: Path, capsys: Any) -> None:
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    own.main(["--sources", "own", "--only", "usual|linear|large", "--out", str(here)])
    own.main(["--sources", "own", "--only", "usual|large", "--out", str(there), "--seed", "5"])
    capsys.readouterr()
    own.main(["--out", str(here), "--compare", str(there), "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    errors = [f"{rows_of(path)['own/usual']['error_2']:.3g}" for path in (here, there)]
    assert [line.split(" | ")[3:5] for line in lines if "own/" in line] == [errors]
    assert lines[-1].startswith("1 models in both")


def test_what_differs_is_seen(own: ModuleType) -> None:
    measure, report = map(
        importlib.import_module, ("public_models_measure", "public_models_report"))
    ones = torch.ones(2)
    gradients: dict[str, Tensor | None] = {"a": 3 * ones[:1], "b": 4 * ones[:1], "c": None}
    plain = measure.Step([ones], [ones], (1,), gradients, None)
    assert measure.differences(plain, plain, "exact", gradients=True) == []
    other = measure.Step([ones, ones], [2 * ones], (2,), {**gradients, "b": 9 * ones[:1]}, None)
    assert measure.differences(plain, other, "exact", gradients=True) == [
        "outputs, exact", "buffers, exact", "random state, exact", "gradients, exact"]
    # |g| = 5, and the gradient of b is off by 5.
    assert measure.gradient_error(plain, other) == (1.0, "b", 1.0)
    broken = replace(other, gradients={**gradients, "a": math.nan * ones[:1]})
    assert measure.gradient_error(plain, broken) == (math.inf, "a", 1.0)
    row = measure.Row("own/x", differs=["outputs, exact"])
    assert report.notes([row]) == ["Not bit-identical: own/x (outputs, exact)."]
    assert [report.quantile([3.0, 1.0, 2.0], percent) for percent in (1, 50, 99)] == [1, 2, 3]


def test_failure_of_the_wrapper_is_not_that_of_the_model(
        own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = importlib.import_module("public_models_measure")

    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("no wrapper")

    monkeypatch.setattr(measure, "QuantBackwardWrapper", refuse)
    row = own.measure_model("own/linear", own.Knobs())
    assert (row.status, row.detail) == ("FAILS WRAPPED", "RuntimeError: no wrapper")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # about forks beside threads
def test_child_that_dies_or_hangs_has_a_row(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "measure_model", lambda model, knobs: os._exit(3))
    row = study.measure_apart("own/x", study.Knobs())
    assert (row.status, row.detail) == ("process died", "exit code 3")
    monkeypatch.setattr(study, "measure_model", lambda model, knobs: time.sleep(60))
    assert study.measure_apart("own/x", study.Knobs(seconds=0.2)).status == "out of time"


@pytest.mark.usefixtures("in_process")
@pytest.mark.filterwarnings("ignore")  # from the models' own libraries
def test_public_models(study: ModuleType, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "models.jsonl"
    study.main([
        "--sources", "transformers", "torchvision", "--only", "/(bert|squeezenet1_1)$",
        "--out", str(out), "--markdown"])
    rows = rows_of(out)
    assert {row["status"] for row in rows.values()} == {"measured"}, rows
    assert not any(row["differs"] for row in rows.values())
    printed = capsys.readouterr().out
    assert all(f"| {source} | 1 | " in printed for source in ("transformers", "torchvision"))
    assert "| all | 2 | " in printed


def test_smallest_of_a_family(study: ModuleType) -> None:
    vision = importlib.import_module("public_models_vision")
    for names in (["convnext_atto", "convnext_tiny", "convnext_base", "convnext_xlarge"],
                  ["efficientnet_b0", "efficientnet_b3", "efficientnet_el"],
                  ["cait_xxs24_224", "cait_s24_224"], ["edgenext_xx_small", "edgenext_small"],
                  ["resnet10t", "resnet18", "resnet101"]):
        assert min(reversed(names), key=vision.size_of) == names[0]
        assert len(set(map(vision.family, names))) == 1
    assert vision.family("convnextv2_atto") == "convnextv2"


@pytest.mark.usefixtures("study")
@pytest.mark.filterwarnings("ignore")  # from the models' own libraries
def test_configurations_shrink() -> None:
    pytest.importorskip("transformers")
    tiny = importlib.import_module("public_models_transformers")
    fields = {
        "num_hidden_layers": 32, "layer_types": ["full", "full", "sliding", "other"] * 8,
        "hidden_size": 64, "intermediate_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 32, "pad_token_id": 1, "eos_token_id": 50000, "vocab_size": 50001,
        "use_cache": True, "tie": False, "vision_config": {"model_type": "x", "depths": [3, 1, 9]}}
    assert tiny.shrunk(fields, tiny.SMALLER) == {
        "num_hidden_layers": 3, "layer_types": ["full", "sliding", "other"],
        "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4,
        "eos_token_id": 3, "vocab_size": 512, "use_cache": False,
        "vision_config": {"model_type": "x", "depths": [2, 1, 2]}}
    assert tiny.sections([4.0, 6.4, 5.6]) == [4, 6, 6]
