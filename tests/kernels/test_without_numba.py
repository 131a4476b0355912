"""CPU tensors if numba is missing, broken or switched off, or has no folder for its cache."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba.core.caching as caching
import pytest
import torch

from brevitas_bp import codec_from
from brevitas_bp.kernels.cpu import compiling
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Stochastic2
from tests.format.golden import digest, values

SCRIPT = """
import warnings
warnings.simplefilter("always")
from brevitas_bp import codec_from
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Stochastic2
from tests.format.golden import digest, values
with warnings.catch_warnings(record=True) as told:
    for _ in range(2):
        found = digest(codec_from(Stochastic2).encode(values(64, 256), seed=1))
print(found, *(str(w.message) for w in told if "numba" in str(w.message)), sep="|")
"""


def run(**environ: str) -> list[str]:
    """Returns the digest, and the warnings about numba."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True,
        env={**os.environ, **environ}, cwd=Path(__file__).parents[2])
    return done.stdout.strip().split("|")


@pytest.mark.parametrize(("content", "told"), [
    ("raise ImportError('libllvm is gone')", "libllvm is gone"),
    ("raise OSError('no such symbol')", "no such symbol"), (None, "NUMBA_DISABLE_JIT")])
def test_the_reference_serves_where_numba_does_not(
        content: str | None, told: str, tmp_path: Path) -> None:
    environ = {"NUMBA_DISABLE_JIT": "1"}
    if content is not None:
        (tmp_path / "numba").mkdir()
        (tmp_path / "numba" / "__init__.py").write_text(content)
        environ = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    found, *messages = run(**environ)
    assert found == digest(codec_from(Stochastic2).encode(values(64, 256), seed=1))
    (message,) = messages
    assert told in message and "slower torch reference" in message


def test_nowhere_to_keep_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR"):
        assert not compiling._can_keep()
    monkeypatch.setattr(compiling, "KEPT", False)

    def double(x: Any) -> Any:
        return 2 * x

    assert compiling.jit(double)(torch.tensor(3.0).item()) == 6.0
