"""The disk cache of numba is reused until any kernel source changes."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

compiling = pytest.importorskip("brevitas_bp.kernels.cpu.compiling")

MODULE = """
from brevitas_bp.kernels.cpu import compiling

sources = compiling.SOURCES


@compiling.jit
def add_one(x):
    return x + 1


def make():
    sources = compiling.SOURCES

    @compiling.c_function
    def nothing(data):
        _ = sources

    return nothing


add_one(1)
nothing = make()
"""


def load(path: Path) -> ModuleType:
    """Loads a module as another process would."""
    spec = importlib.util.spec_from_file_location("kept", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hits(module: ModuleType) -> tuple[int, int]:
    """Returns how many compiled functions came from disk: Python functions, and C functions."""
    return sum(module.add_one.stats.cache_hits.values()), module.nothing.cache_hits


def test_what_is_on_disk_is_stale_when_any_source_changes(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kept.py"
    path.write_text(MODULE)
    assert hits(load(path)) == (0, 0)
    assert hits(load(path)) == (1, 1)
    monkeypatch.setattr(compiling, "SOURCES", compiling.SOURCES + 1)
    assert hits(load(path)) == (0, 0)


def test_the_number_is_that_of_the_contents(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiling._digest() == compiling.SOURCES
    package = Path(compiling.__file__).parents[2]
    for room in ("activations", "format", "kernels/cpu"):
        shutil.copytree(package / room, tmp_path / room)
    monkeypatch.setattr(compiling, "__file__", str(tmp_path / "kernels/cpu/compiling.py"))
    assert compiling._digest() == compiling.SOURCES
    for changed in ("kernels/cpu/buckets.py", "format/random.py", "activations/functions.py"):
        before = compiling._digest()
        with (tmp_path / changed).open("a") as file:
            file.write("# another")
        assert compiling._digest() != before
