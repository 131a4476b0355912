"""Wheel and sdist are built as an installer builds them; the wheel works away from the checkout."""

import doctest
import io
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import brevitas_bp
from tests.test_architecture import imports, loaded_by
from tests.test_docs import PROJECT
from tests.test_readme import ROOT, python_blocks

pytest.importorskip("hatchling", reason="hatchling is not installed; the extra 'test' has it")

import hatch_build
from hatch_build import RELATIVE, absolute

BUILD = "import sys; from hatchling import build; build.build_{}(sys.argv[1])"


def build(kind: str, folder: Path, source: Path = ROOT) -> Path:
    """Returns the archive that the project's build backend makes, without network."""
    subprocess.run([sys.executable, "-c", BUILD.format(kind), str(folder)], cwd=source, check=True)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    archive = build("sdist", tmp_path_factory.mktemp("sdist"))
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    return unpacked


def metadata_of(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return io.TextIOWrapper(file.open(name), encoding="utf-8").read()


def files_of(folder: str) -> set[str]:
    """Returns the files of a folder of the checkout, without what tools left there."""
    names = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {name for name in names if not re.search(r"/(__pycache__|\.[^/]+)/", name)}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert "brevitas_bp/py.typed" in names
    beside = f"brevitas_bp-{brevitas_bp.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"brevitas_bp", beside}
    assert {name for name in names if name.startswith("brevitas_bp/")} == files_of("brevitas_bp")


def test_the_sdist_holds_all_that_tests_and_docs_need(sdist: Path) -> None:
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "hatch_build.py", "CONTRIBUTING.md"):
        assert (sdist / name).read_bytes() == (ROOT / name).read_bytes()
    inside = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    for folder in ("tests", "docs", "examples", "brevitas_bp"):
        assert inside >= files_of(folder)
    assert not [name for name in inside if "__pycache__" in name or name.startswith(("build/", ".venv"))]


def test_a_wheel_made_of_the_sdist_is_the_same(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    again = build("wheel", tmp_path, source=sdist)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        first, second = ([(i.filename, i.CRC) for i in file.infolist()] for file in (one, other))
    assert first == second


def test_the_readme_of_the_package_has_no_relative_links(wheel: Path) -> None:
    assert doctest.testmod(hatch_build).failed == 0
    readme = (ROOT / "README.md").read_text()
    assert RELATIVE.search(readme)       # the control
    assert RELATIVE.search(metadata_of(wheel)) is None
    linked = absolute(readme, "https://example.org/x")
    assert RELATIVE.search(linked) is None
    assert "(https://example.org/x/blob/main/docs/policy.md)" in linked


#: Packages that the package imports at first use -> the extra that brings them.
OPTIONAL = {
    "numba": "cpu", "llvmlite": "cpu", "triton": "gpu", "scipy": "plan", "matplotlib": "plots",
    "rich": "all", "hypothesis": "test"}


def test_everything_that_the_package_imports_is_declared() -> None:
    """As a dependency, or in an extra. Extras are not needed to import the package."""
    required = {re.split("[<>=]", name)[0].replace("-", "_") for name in PROJECT["dependencies"]}
    imported = {
        module.partition(".")[0] for path in (ROOT / "brevitas_bp").rglob("*.py")
        for _, module in imports(path.read_text())}
    assert imported - sys.stdlib_module_names - {"brevitas_bp"} == required | set(OPTIONAL)
    extras = PROJECT["optional-dependencies"]
    for package, extra in OPTIONAL.items():
        brought = "numba" if package == "llvmlite" else package
        assert any(name.startswith(brought) for name in extras[extra]), package
    loaded = loaded_by("import brevitas_bp, brevitas_bp.quant")
    assert required <= loaded and not set(OPTIONAL) - {"triton"} & loaded       # torch loads triton


def run(arguments: Sequence[str], folder: Path = ROOT, path: Path = ROOT) -> str:
    """Runs Python with the package from ``path``; returns what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_readme_runs_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """In an empty folder, in a fresh interpreter, with the dependencies visible. Compiles no kernel."""
    target, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    run([
        "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile", "--target", str(target),
        str(wheel)])
    script = empty / "first.py"
    script.write_text("\n".join([
        "import brevitas_bp.kernels",
        "brevitas_bp.kernels.use('reference')",
        python_blocks((ROOT / "README.md").read_text())[0],
        "print(brevitas_bp.__file__)"]))
    printed = run([str(script)], folder=empty, path=target)
    assert printed.splitlines()[-1] == str(target / "brevitas_bp" / "__init__.py")
    assert "MiB" in printed
