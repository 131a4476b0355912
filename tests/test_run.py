"""The script launcher, and its report on the allocator of a process."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from brevitas_bp import QuantBackwardWrapper, allocators, run

SHOW = """import json, sys
from brevitas_bp import allocators
print(json.dumps([allocators.running(), sys.argv]))"""
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD")


def launched(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "brevitas_bp.run", *arguments], capture_output=True, text=True,
        check=False, env={**os.environ, **environ})


@linux
def test_a_script_runs_under_the_allocator_of_the_package(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SHOW)
    done = launched(str(script), "--epochs", "3")
    assert json.loads(done.stdout) == ["mimalloc", [str(script), "--epochs", "3"]]
    assert done.returncode == 0 and not done.stderr


@linux
def test_its_exit_status_is_that_of_the_script() -> None:
    assert launched("-c", "raise SystemExit(7)").returncode == 7


@pytest.mark.parametrize(("arguments", "told"), [
    ([], "expected script.py"), (["--alocator", "x"], "expected script.py"),
    (["--allocator", "dlmalloc", "x.py"], "one of mimalloc, tcmalloc, jemalloc"),
    (["--help"], "0")])
def test_what_it_does_not_understand(arguments: list[str], told: str) -> None:
    with pytest.raises(SystemExit, match=told):
        run.main(arguments)


def test_options_settings_and_other_libraries_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "orig_argv", ["python", "-X", "dev", "-m", "brevitas_bp.run", "a.py", "1"])
    before = {"LD_PRELOAD": "/lib/y.so", "MIMALLOC_PURGE_DELAY": "5"}
    argv, environ = run.command(["a.py", "1"], ("mimalloc", "/lib/x.so"), before)
    assert argv == [sys.executable, "-X", "dev", "a.py", "1"]
    assert environ == {"LD_PRELOAD": "/lib/x.so:/lib/y.so", "MIMALLOC_PURGE_DELAY": "5"}
    assert run.command(["a.py"], None, {"A": "b"}) == ([sys.executable, "-X", "dev", "a.py"], {"A": "b"})


@pytest.mark.parametrize(("arguments", "options"), [
    (["-m", "brevitas_bp.run", "-m", "x"], []), (["-Om", "brevitas_bp.run", "a.py"], ["-O"]),
    (["-O", "-W", "ignore", "-mbrevitas_bp.run", "a.py"], ["-O", "-W", "ignore"]), (["a.py"], [])])
def test_options_of_the_interpreter(arguments: list[str], options: list[str]) -> None:
    assert run._interpreter_options(arguments) == options


def test_without_an_allocator_the_script_runs_all_the_same(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called = []

    class ReplacedError(Exception):
        pass

    def execve(*arguments: object) -> None:
        called.append(arguments)
        raise ReplacedError

    monkeypatch.setattr(run, "find", lambda name=None: None)
    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(ReplacedError):
        run.main(["a.py"])
    assert len(called) == 1 and "pip install brevitas-bp[allocator]" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="jemalloc was not found"):
        run.main(["--allocator", "jemalloc", "a.py"])


def test_the_hint_comes_once_and_only_where_it_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocators, "_hinted", [])
    monkeypatch.setattr(allocators, "_MUCH", 1000)
    model, x = QuantBackwardWrapper(nn.Linear(64, 64)), torch.randn(64, 64)
    monkeypatch.setattr(allocators, "is_wasteful", lambda: False)
    model(x)
    monkeypatch.setattr(allocators, "is_wasteful", lambda: True)
    with pytest.warns(UserWarning, match="python -m brevitas_bp.run"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)


def test_settings_of_glibc_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocators, "running", lambda: "glibc")
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    assert allocators.is_wasteful()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    assert not allocators.is_wasteful()
