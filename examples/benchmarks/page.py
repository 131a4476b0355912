"""Reads measurements back from the Markdown tables of a page."""

import re
from pathlib import Path
from typing import Any

_CELLS = re.compile(r"^\| (.*) \|$")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


def tables_of(page: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """Returns heading -> tables below it, each as rows of column -> number or text."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    heading, lines = "", [*page.read_text().splitlines(), ""]
    columns: list[str] = []
    for line in lines:
        cells = _CELLS.match(line)
        if cells is None:
            columns = []
            heading = line.lstrip("# ") if line.startswith("#") else heading
        elif not columns:
            columns = cells[1].split(" | ")
            found.setdefault(heading, []).append([])
        elif not set(line) <= set("| -"):
            values = [_value(cell) for cell in cells[1].split(" | ")]
            found[heading][-1].append(dict(zip(columns, values)))
    return found


def _value(cell: str) -> float | str:
    cell = cell.strip()
    return float(cell) if _NUMBER.fullmatch(cell) else cell
