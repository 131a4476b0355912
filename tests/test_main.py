"""``python -m brevitas_bp``: what a bug report needs."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from brevitas_bp import __main__ as command
from brevitas_bp import __version__
from brevitas_bp.codec import Codec
from brevitas_bp.codec.lowered import KINDS
from brevitas_bp.kernels import dispatch


def test_it_prints_versions_backends_and_checks() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "brevitas_bp"], stdout=subprocess.PIPE, text=True, check=True)
    lines = done.stdout.splitlines()
    found = {line.split()[0]: line for line in lines if line.strip()}
    assert found["brevitas_bp"].split() == ["brevitas_bp", __version__]
    assert torch.__version__ in found["torch"]
    assert {line.split()[1] for line in lines if line.startswith("cpu ")} == set(KINDS)
    assert sum(" ok (" in line for line in lines) >= len(KINDS)


def test_the_backend_is_that_which_serves_the_tensor() -> None:
    with dispatch.use("reference"):
        assert {backend for _, _, backend, _ in command.checks()} == {"torch reference"}


class _Drifting:
    """Encodes as a codec does; compiled kernels give other bytes or values than the reference."""

    def __init__(self, codec: Codec, in_bytes: float, in_values: float) -> None:
        self.codec, self.in_bytes, self.in_values = codec, in_bytes, in_values

    def encode(self, x: Tensor, *, seed: int) -> Any:
        compiled = dispatch.CHOICE.preference == "fastest"
        packed = self.codec.encode(x + self.in_bytes * compiled, seed=seed)
        value = packed.decode() + self.in_values * compiled
        return SimpleNamespace(tensors=packed.tensors, decode=lambda: value)


def test_other_bytes_and_values_are_found() -> None:
    codec, x = command._codecs()["stochastic"], torch.randn(300)
    assert command.check(codec, x) == "ok"
    bytes_differ: Any = _Drifting(codec, 1.0, 0.0)
    assert command.check(bytes_differ, x) == "bytes differ from the reference"
    values_differ: Any = _Drifting(codec, 0.0, 1.0)
    assert command.check(values_differ, x) == "values differ from the reference"


def test_an_error_is_a_result_and_the_exit_status_is_1(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(codec: Codec, x: Tensor) -> str:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(command, "check", failing)
    assert command.main() == 1
    assert capsys.readouterr().out.count("RuntimeError: no kernel (") >= len(KINDS)
