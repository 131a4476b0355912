"""BREVITAS_JIT=1, which scripts stock components, changes no bit."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.codec.jit_worker import CONFIGS, results
from tests.support import same_bits

ROOT = Path(__file__).parents[2]
# If the extension of Brevitas is not built yet, building it takes half a minute.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Returns the results of a process with BREVITAS_JIT=1."""
    file = tmp_path_factory.mktemp("jit") / "results.pt"
    done = subprocess.run(
        [sys.executable, "-m", "tests.codec.jit_worker", str(file)], cwd=ROOT,
        env={**os.environ, "BREVITAS_JIT": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    saved = torch.load(file)
    assert saved["jit"]
    return saved["results"]


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, Any]]:
    return results()


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_and_values_are_the_same(
        name: str, scripted: dict[str, dict[str, Any]], plain: dict[str, dict[str, Any]]) -> None:
    first, second = scripted[name], plain[name]
    assert all(map(same_bits, first["bytes"], second["bytes"]))
    assert same_bits(first["value"], second["value"])
    assert same_bits(first["decoded"], second["decoded"])


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_gives_the_value_of_the_layer(
        name: str, scripted: dict[str, dict[str, Any]]) -> None:
    assert torch.equal(scripted[name]["decoded"], scripted[name]["value"])


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_same(
        name: str, scripted: dict[str, dict[str, Any]], plain: dict[str, dict[str, Any]]) -> None:
    # Scripted graphs may sum the gradients of scale and offset in another order.
    torch.testing.assert_close(scripted[name]["gradient"], plain[name]["gradient"])
