"""The bytes of every config equal those in a file, on any processor, compiled or not."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.format import golden

#: Limits on the instructions that torch may use, from the lowest.
CAPABILITIES = ["default", "avx2", "avx512"]


def test_compiled_kernels() -> None:
    assert golden.differing(golden.digests()) == []


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_reference_with_vectors_of_any_width(capability: str) -> None:
    best = torch.backends.cpu.get_cpu_capability().lower()
    if best not in CAPABILITIES or CAPABILITIES.index(capability) > CAPABILITIES.index(best):
        pytest.skip(f"this processor has {best}")
    done = subprocess.run(
        [sys.executable, "-m", "tests.format.golden", "--reference"], capture_output=True, text=True,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, check=False)
    report = json.loads(done.stdout)
    assert report == {"capability": capability.upper(), "differing": []}


def test_a_changed_byte_is_seen() -> None:
    expected = json.loads(golden.FILE.read_text())
    name = next(iter(expected))
    assert golden.differing({**expected, name: "0"}) == [name]
    assert golden.differing({**expected, "new": "0"}) == ["new"]
