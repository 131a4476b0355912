"""Checkpoints are atomic, belong to one configuration, and continue bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import checkpoint
import files
import pytest
import torch
import train
from faults import InputError, Interrupted
from torch import Tensor
from trainer import Progress

from brevitas_bp import QuantBackwardWrapper

TINY = train.Knobs(
    dataset="digits",
    limit_train=64,
    limit_test=20,
    batch_size=16,
    epochs=2,
    dropout=0.2,
    threads=1,
    progress=False,
)
QUANTIZERS = {
    "fp32": ("none", ()),
    "stochastic": ("ShiftedUint2DynamicActPerBucketFloatStochastic", ("bucket_size=64",)),
    "mix": ("ShiftedUint2Mix4DynamicActPerBucketFloatStochastic", ()),
}


def knobs_for(kind: str, out: Path, **changes: Any) -> train.Knobs:
    quant, overrides = QUANTIZERS[kind]
    return replace(TINY, quant=quant, quant_override=overrides, out=str(out), **changes)


def interrupt_at(epoch: int, step: int) -> Callable[[Progress], object]:
    """Return a step hook that presses Ctrl-C after the given step."""

    def press(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (epoch, step):
            signal.raise_signal(signal.SIGINT)

    return press


def final_state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["state"]


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return every tensor and plain value of a nested state, by its path."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        return {path: value}
    return {k: v for key, item in items for k, v in leaves(item, f"{path}/{key}").items()}


def assert_same_state(left: dict[str, Any], right: dict[str, Any]) -> None:
    one, two = leaves(left), leaves(right)
    assert one.keys() == two.keys()
    for path, value in one.items():
        other = two[path]
        same = torch.equal(value, other) if isinstance(value, Tensor) else value == other
        assert same, path


@pytest.fixture(scope="module", params=QUANTIZERS)
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was never interrupted, named for its quantizer."""
    folder = tmp_path_factory.mktemp("straight") / request.param
    train.run(knobs_for(request.param, folder))
    return folder


@pytest.mark.parametrize(
    ("epoch", "step"), [(0, 2), (0, 4), (1, 3)], ids=["mid-epoch", "epoch end", "second epoch"]
)
def test_interrupted_and_resumed_run_is_bit_exact(
    tmp_path: Path, straight: Path, epoch: int, step: int
) -> None:
    broken = knobs_for(straight.name, tmp_path / "broken")
    with pytest.raises(Interrupted, match=f"saved in epoch {epoch + 1}, step {step}"):
        train.run(broken, interrupt_at(epoch, step))
    resumed = train.run(replace(broken, resume=True))
    assert_same_state(final_state(straight), final_state(tmp_path / "broken"))
    logs = [files.read_json_lines(f / "log.jsonl") for f in (straight, tmp_path / "broken")]
    assert resumed["accuracy"] == logs[0][-1]["test_accuracy"]
    for row in (*logs[0], *logs[1]):
        del row["seconds_per_step"]
    assert logs[0] == logs[1]


def test_positive_control_a_lost_noise_state_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.run(knobs_for("stochastic", tmp_path / "straight"))
    broken = knobs_for("stochastic", tmp_path / "broken")
    with pytest.raises(Interrupted):
        train.run(broken, interrupt_at(0, 2))
    monkeypatch.setattr(QuantBackwardWrapper, "set_noise_state", lambda wrapper, state: None)
    train.run(replace(broken, resume=True))
    with pytest.raises(AssertionError):
        assert_same_state(final_state(tmp_path / "straight"), final_state(tmp_path / "broken"))


def test_save_every_leaves_a_checkpoint_that_survives_a_kill(tmp_path: Path) -> None:
    def die(progress: Progress) -> None:
        if progress.step == 4:
            raise MemoryError

    knobs = knobs_for("fp32", tmp_path / "killed", save_every=3)
    with pytest.raises(MemoryError):
        train.run(knobs, die)
    assert final_state(tmp_path / "killed")["progress"]["step"] == 3
    train.run(replace(knobs, resume=True))
    train.run(knobs_for("fp32", tmp_path / "straight"))
    assert_same_state(final_state(tmp_path / "straight"), final_state(tmp_path / "killed"))


def test_an_epoch_repeated_after_a_kill_counts_once(tmp_path: Path) -> None:
    knobs = knobs_for("fp32", tmp_path / "run", epochs=1)
    first = train.run(knobs)
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text() * 2)
    assert train.run(replace(knobs, resume=True)) == first
    assert len(log.read_text().splitlines()) == 2  # append-only: no row was removed


def test_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError("disk full")

    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(tmp_path / "x", fail)
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_file_is_on_disk_before_it_replaces_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def spy_replace(self: Path, target: Path) -> Path:
        calls.append("replace")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", lambda number: (calls.append("fsync"), fsync(number)))
    monkeypatch.setattr(Path, "replace", spy_replace)
    files.write_atomically(tmp_path / "x", lambda file: file.write(b"new"))
    assert calls == ["fsync", "replace"]
    assert (tmp_path / "x").read_bytes() == b"new"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save_checkpoint(path, {"lr": 0.1, "quant": "A"}, {"w": torch.arange(300.0)})
    return path


def test_checkpoint_round_trip(saved: Path) -> None:
    state = checkpoint.load_checkpoint(saved, {"lr": 0.1, "quant": "A"})
    assert torch.equal(state["w"], torch.arange(300.0))


def test_other_config_is_refused_with_the_knobs_that_differ(saved: Path) -> None:
    with pytest.raises(InputError, match=r"lr: saved 0\.1, now 0\.2\n  quant: saved 'A', now 'B'"):
        checkpoint.load_checkpoint(saved, {"lr": 0.2, "quant": "B"})


@pytest.mark.parametrize("keep", [0, 100, 1000])
def test_damaged_checkpoint_is_refused(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"checkpoint\.pt: damaged checkpoint"):
        checkpoint.load_checkpoint(saved, {})


def test_foreign_or_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint to resume"):
        checkpoint.load_checkpoint(tmp_path / "checkpoint.pt", {})
    torch.save({"model": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="expected a checkpoint of format 1"):
        checkpoint.load_checkpoint(tmp_path / "checkpoint.pt", {})


def test_signal_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        train.run(knobs_for("fp32", tmp_path / "run"), interrupt_at(0, 1))
    assert signal.getsignal(signal.SIGINT) is before
