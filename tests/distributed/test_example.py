"""examples/distributed/train_ddp.py, as it is launched."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import ROOT, torchrun

SCRIPT = ROOT / "examples" / "distributed" / "train_ddp.py"


def train(processes: int, out: Path, *options: str) -> str:
    """What a run prints."""
    done = torchrun(processes, str(SCRIPT), "--out", str(out), *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tensors(checkpoint: Path) -> dict[str, Any]:
    """Network, optimizer, noise and epoch, by name."""
    state = torch.load(checkpoint / "checkpoint.pt", weights_only=True)["state"]
    moments = {
        f"{key} {name}": value for key, values in state["optimizer"]["state"].items()
        for name, value in values.items()}
    return {**state["net"], **moments, "noise": state["noise"], "epoch": state["epoch"]}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Equal bits."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_resumes_bit_for_bit_with_the_other_strategy_and_in_one_process(tmp_path: Path) -> None:
    printed = train(2, tmp_path / "straight", "--epochs", "2")
    assert printed.count("10.8") == 2  # both ranks store so much less
    train(2, tmp_path / "stopped", "--epochs", "1", "--strategy", "fsdp")
    stopped, straight = (tensors(tmp_path / name) for name in ("stopped", "straight"))
    assert not same(stopped, straight)
    train(2, tmp_path / "stopped", "--epochs", "2", "--resume")
    assert same(tensors(tmp_path / "stopped"), straight)
    printed = train(1, tmp_path / "stopped", "--epochs", "3", "--resume", "--strategy", "fsdp")
    assert "fsdp on 1 processes" in printed
    assert tensors(tmp_path / "stopped")["epoch"] == 3


def test_says_how_to_launch_it(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    spec = importlib.util.spec_from_file_location("train_ddp", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_ddp", module)
    monkeypatch.setattr("sys.path", list(sys.path))
    spec.loader.exec_module(module)
    assert module.main([]) == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err
