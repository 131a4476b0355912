"""The notebooks run from top to bottom, without jupyter, and hold their outputs."""

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples" / "notebooks"))
from execute import run_cell  # noqa: E402

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def run(sources: list[str], name: str = "notebook") -> list[list[dict[str, Any]]]:
    """Runs cells in one namespace, as a kernel does; returns the outputs of each."""
    namespace: dict[str, Any] = {"__name__": name}
    return [
        run_cell(source, namespace, f"{name}, cell {number}") for number, source in enumerate(sources)]


def test_there_are_notebooks_and_a_cell_that_fails_is_noticed() -> None:
    assert len(NOTEBOOKS) >= 2
    with pytest.raises(ZeroDivisionError):
        run(["x = 1", "x / 0"])


def test_outputs_are_what_a_cell_prints_returns_and_draws() -> None:
    (first, second, third, fourth) = run([
        "%matplotlib inline\nprint(1)\nx = 2", "x", "x;x\nNone",
        "from matplotlib.figure import Figure\nFigure()"])
    assert [output["text"] for output in first] == [["1\n"]]
    assert [output["data"]["text/plain"] for output in second] == [["2"]]
    assert third == []
    assert base64.b64decode(fourth[0]["data"]["image/png"]).startswith(b"\x89PNG")


def kinds(outputs: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Returns what can be compared between machines: kinds of outputs, not their numbers."""
    return [(output["output_type"], sorted(output.get("data", {}))) for output in outputs]


@each
def test_it_runs_and_its_outputs_are_committed(path: Path) -> None:
    code = cells(path, "code")
    outputs = run(["".join(cell["source"]) for cell in code], path.stem)
    assert [kinds(found) for found in outputs] == [kinds(cell["outputs"]) for cell in code]
    assert any(outputs)


@each
def test_it_is_a_valid_notebook(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    counts = [cell["execution_count"] for cell in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert path.stat().st_size < 1_000_000


@each
def test_its_links_lead_to_files(path: Path) -> None:
    text = "".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links
    for link in links:
        assert (path.parent / link).exists(), link
