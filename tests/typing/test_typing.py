"""A typed project can use the whole public API: pyright accepts ``user_code.py`` in strict mode."""

import ast
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
USER_CODE = HERE / "user_code.py"
#: Packages whose public names the file uses.
PACKAGES = ["brevitas_bp", *(f"brevitas_bp.{name}" for name in (
    "allocate", "backward", "codec", "grad", "memory", "nn.auxiliary", "nn.learned", "plots",
    "testing"))]


def complaints(file: Path) -> list[str]:
    """Returns what pyright says about a file, in strict mode."""
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "-p", str(HERE / "pyrightconfig.json")]
        if file == USER_CODE else [sys.executable, "-m", "pyright", "--outputjson", str(file)],
        capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == 1, done.stderr
    return [
        f"line {c['range']['start']['line'] + 1}: {c['message']}" for c in found["generalDiagnostics"]]


needs_pyright = pytest.mark.skipif(
    importlib.util.find_spec("pyright") is None, reason="pyright is not installed")


@needs_pyright
def test_strict_checking_finds_nothing() -> None:
    assert complaints(USER_CODE) == []


@needs_pyright
def test_strict_checking_finds_what_is_wrong(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "# pyright: strict\nfrom brevitas_bp import track_saved_memory\n"
        "with track_saved_memory(3) as report:\n    report.by(1)\n")
    assert [text.partition(":")[0] for text in complaints(wrong)] == ["line 3", "line 4"]


def test_every_public_name_is_used() -> None:
    tree = ast.parse(USER_CODE.read_text())
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for package in PACKAGES:
        assert set(importlib.import_module(package).__all__) - used == set(), package


def test_the_code_runs(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("user_code", USER_CODE)
    assert spec is not None and spec.loader is not None
    user_code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(user_code)
    user_code.main(tmp_path)


def test_the_package_is_marked_as_typed() -> None:
    assert (HERE.parents[1] / "brevitas_bp" / "py.typed").is_file()
