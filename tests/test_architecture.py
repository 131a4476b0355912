"""Imports run downhill, importing is cheap, and the public API stays small: checked on the source."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import brevitas_bp

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "brevitas_bp"

#: Each room may import from its own level and from earlier levels.
LEVELS: list[set[str]] = [
    {"errors", "probes", "allocators", "private", "text", "drawing"},
    {"activations"}, {"format"}, {"kernels"}, {"core"}, {"proxy", "quant_tensor"}, {"codec"},
    {"quant"}, {"backward"}, {"nn", "grad"}, {"memory_tables"}, {"allocate", "memory"},
    {"plots", "models", "run", "trainers", "__main__"}, {"testing"}]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

#: Heavy or optional modules: loaded at first use, by the rooms that use them.
LAZY = {
    "torchvision", "matplotlib", "sklearn", "numba", "triton", "rich", "pytest", "hypothesis",
    "lightning", "accelerate", "transformers", "peft", "timm"}


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Yields (relative level, module) of every import, including imports inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def complaints(room: str, source: str) -> list[str]:
    """Returns what is wrong with a file's imports in ``room``; an empty room is the package itself."""
    found = []
    for relative, module in imports(source):
        top, _, rest = module.partition(".")
        if relative:
            found.append(f"relative import of {module!r}")
        elif top == "brevitas_bp" and room:
            other = rest.partition(".")[0]
            if other not in LEVEL:
                found.append(f"imports {module!r}, which has no level")
            elif LEVEL[other] > LEVEL[room]:
                found.append(f"imports {module!r} uphill")
        elif top == "brevitas_bp" and rest.partition(".")[0] in ("models", "plots"):
            found.append(f"{module!r} belongs to the examples")
    return found


def room_of(path: Path) -> str:
    """``brevitas_bp/codec/base.py`` -> "codec"; ``brevitas_bp/__init__.py`` -> ""."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


SOURCES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(("room", "source"), [
    ("kernels", "from brevitas_bp.codec import Codec"),
    ("codec", "def late():\n    import brevitas_bp.memory"),
    ("proxy", "from brevitas_bp import QuantBackwardWrapper"),
    ("codec", "from .base import Codec"),
    ("backward", "from brevitas_bp.new_room import x"),
    ("", "from brevitas_bp.models import efficientnet_v2_s")])
def test_check_finds_what_is_wrong(room: str, source: str) -> None:
    assert complaints(room, source)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_run_downhill(path: Path) -> None:
    assert room_of(path) in {"", *LEVEL}
    assert complaints(room_of(path), path.read_text()) == []


#: Modules of backward/ that may import the wrapper. The wrapper may not import them.
AROUND_THE_WRAPPER = {"__init__", "seam"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "backward").rglob("*.py")), ids=name_of)
def test_within_backward_the_wrapper_is_on_top(path: Path) -> None:
    known = {module for _, module in imports(path.read_text())}
    above = {f"brevitas_bp.backward.{name}" for name in ("wrapper", "seam")}
    assert path.stem in AROUND_THE_WRAPPER or not known & above


def private_of_the_wrapper() -> set[str]:
    """Returns private attributes of a wrapper that no other module has."""
    wrapper = brevitas_bp.QuantBackwardWrapper(nn.Identity())
    return {name for name in dir(wrapper) if name.startswith("_")} - set(dir(nn.Identity()))


def borrowed(source: str, names: set[str]) -> list[str]:
    """Returns attributes with these names that a file reads or writes on objects other than ``self``."""
    return [
        f"line {node.lineno}: {node.attr}" for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr in names
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))]


def test_only_backward_knows_what_is_inside_the_wrapper() -> None:
    names = private_of_the_wrapper()
    assert borrowed("model._listeners.append(note)", names)  # the control
    found = {
        name_of(path): lines for path in SOURCES if room_of(path) != "backward"
        and (lines := borrowed(path.read_text(), names))}
    assert found == {}


LONGEST = 400


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_are_short(path: Path) -> None:
    assert path.read_text().count("\n") <= LONGEST


def test_public_names_are_few_and_exist() -> None:
    names = brevitas_bp.__all__
    assert len([name for name in names if not name.startswith("__")]) <= 20
    assert len(set(names)) == len(names)
    assert all(hasattr(brevitas_bp, name) for name in names)


def loaded_by(statement: str) -> set[str]:
    """Returns the top-level modules in a fresh interpreter after ``statement``."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_loads_nothing_heavy() -> None:
    # The project cannot change what torch and Brevitas load themselves.
    theirs = loaded_by("import torch, brevitas.nn, brevitas.quant, brevitas.quant.solver.act")
    ours = loaded_by("import brevitas_bp, brevitas_bp.quant, brevitas_bp.models")
    assert "brevitas_bp" in ours
    assert not (ours - theirs) & LAZY
    assert not ours & {"torchvision", "matplotlib", "sklearn", "numba", "lightning", "transformers"}


#: Beginnings of one machine's paths; split, so that this file passes its own test.
MACHINE_PATHS = ["/" + name for name in ("work/", "home/", "Users/", "root/", "mnt/")]
TEXT = {
    ".py", ".md", ".rst", ".css", ".cff", ".toml", ".txt", ".cfg", ".yml", ".yaml", ".json", ".csv",
    ".svg", ""}
SHIPPED_HIDDEN = (".ci", ".github", ".gitignore")
SKIPPED = {"runs", "build", "dist", "data"}


def shipped_files() -> Iterator[Path]:
    """Yields text files of the project; hidden folders belong to tools, except some."""
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") for part in parts) and parts[0] not in SHIPPED_HIDDEN
        if path.is_file() and path.suffix in TEXT and not hidden and not SKIPPED & set(parts):
            yield path


def test_no_file_names_a_path_of_one_machine() -> None:
    files = list(shipped_files())
    assert ROOT / "pyproject.toml" in files
    named = [
        f"{name_of(path)}: {line.strip()}" for path in files
        for line in path.read_text(errors="replace").splitlines()
        if any(machine in line for machine in MACHINE_PATHS)]
    assert named == []


def test_the_extensions_of_the_architecture_page_are_where_it_says() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    named = re.findall(r"`((?:\w+/)+\w+\.py)` `(\w+)`", page)
    assert len(named) > 12
    missing = [
        (file, name) for file, name in named
        if not re.search(rf"\b{name}\b", (PACKAGE / file).read_text())]
    assert missing == []
