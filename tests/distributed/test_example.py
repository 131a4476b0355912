"""examples/distributed/train_ddp.py, launched as users do; later jobs share their imports."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.distributed.launch import ROOT, Done, forked, torchrun
from tests.kernels.gpu_worker import Worker

SCRIPT = ROOT / "examples" / "distributed" / "train_ddp.py"


@cache
def script() -> ModuleType:
    """Returns the example as a module."""
    spec = importlib.util.spec_from_file_location("train_ddp", SCRIPT)
    assert spec is not None and spec.loader is not None
    sys.modules["train_ddp"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str]) -> int:
    """Runs the example in one process of a job."""
    return script().main(arguments)


def train(processes: int, out: Path, *options: str) -> Done:
    """Runs a job of the example; called in a worker."""
    script()
    return forked(processes, main, ["--out", str(out), *options])


def printed(done: Done) -> str:
    """Returns the output of a job that succeeded."""
    assert done.returncode == 0, done.output
    return done.output


def tensors(checkpoint: Path) -> dict[str, Any]:
    """Returns network, optimizer, noise and epoch, by name."""
    state = torch.load(checkpoint / "checkpoint.pt", weights_only=True)["state"]
    moments = {
        f"{key} {name}": value for key, values in state["optimizer"]["state"].items()
        for name, value in values.items()}
    return {**state["net"], **moments, "noise": state["noise"], "epoch": state["epoch"]}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether all bits are equal."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_resumes_bit_for_bit_with_the_other_strategy_and_in_one_process(
        tmp_path: Path, launcher: Worker) -> None:
    def run(processes: int, *options: str) -> str:
        return printed(launcher.run(train, processes, tmp_path / "stopped", *options))

    shown = printed(torchrun(
        2, str(SCRIPT), "--out", str(tmp_path / "straight"), "--epochs", "2"))
    assert shown.count("10.8") == 2  # the ratio of both ranks
    run(2, "--epochs", "1", "--strategy", "fsdp")
    stopped, straight = (tensors(tmp_path / name) for name in ("stopped", "straight"))
    assert not same(stopped, straight)
    run(2, "--epochs", "2", "--resume")
    assert same(tensors(tmp_path / "stopped"), straight)
    assert "fsdp on 1 processes" in run(1, "--epochs", "3", "--resume", "--strategy", "fsdp")
    assert tensors(tmp_path / "stopped")["epoch"] == 3


def test_says_how_to_launch_it(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("sys.path", list(sys.path))
    try:
        assert script.__wrapped__().main([]) == 2
    finally:
        del sys.modules["train_ddp"]
    assert "torchrun --nproc-per-node" in capsys.readouterr().err
