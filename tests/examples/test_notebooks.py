"""The notebooks run from top to bottom, without jupyter, and hold no outputs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def run(sources: list[str], name: str = "notebook") -> None:
    """Runs cells in one namespace, as a kernel does."""
    namespace: dict[str, Any] = {"__name__": name}
    for number, source in enumerate(sources):
        exec(compile(source, f"{name}, cell {number}", "exec"), namespace)


def test_there_are_notebooks_and_a_cell_that_fails_is_noticed() -> None:
    assert NOTEBOOKS
    with pytest.raises(ZeroDivisionError):
        run(["x = 1", "x / 0"])


@each
def test_it_runs(path: Path, capsys: Any) -> None:
    run(["".join(cell["source"]) for cell in cells(path, "code")], path.stem)
    assert capsys.readouterr().out


@each
def test_it_is_a_clean_notebook(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    for cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)


@each
def test_its_links_lead_to_files(path: Path) -> None:
    text = "".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links
    for link in links:
        assert (path.parent / link).exists(), link
