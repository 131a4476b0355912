"""Tables of measurements: printed, as Markdown for docs/benchmarks.md, and as JSON for plots."""

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
from tables import show_table


@dataclass(frozen=True)
class Measured:
    """One table of measurements.

    Attributes:
        key: its name in the JSON file.
        title: names size, threads and units.
        rows: column -> cell, a number or a text. All rows have the same columns.
    """

    key: str
    title: str
    rows: list[dict[str, Any]]


def machine() -> dict[str, Any]:
    """Describes the machine that the figures were measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "date": date.today().isoformat(), "commit": commit.stdout.strip(), "device": device,
        "processor": platform.machine(), "threads": torch.get_num_threads(),
        "torch": torch.__version__}


def add_output_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Adds ``--out`` and ``--markdown``."""
    parser.add_argument("--out", type=Path, default=Path(out), help="JSON file")
    parser.add_argument("--markdown", action="store_true", help="print tables as in docs/benchmarks.md")


def publish(tables: list[Measured], options: argparse.Namespace) -> None:
    """Prints tables and writes them, with the machine, to ``options.out``."""
    facts = machine()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    for table in tables:
        print(f"\n{table.title}\n")
        cells = [[_text(value) for value in row.values()] for row in table.rows]
        show_table(list(table.rows[0]), cells, options.markdown)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = {table.key: {"title": table.title, "rows": table.rows} for table in tables}
    options.out.write_text(json.dumps({"machine": facts, "tables": found}, indent=2))


def on_threads(count: int) -> str:
    """Returns the number of threads as text, for titles."""
    return f"{count} thread{'s' if count > 1 else ''}"


def _text(value: Any) -> str:
    """Formats a cell: three significant digits, or all digits before the decimal point.

    >>> _text(0.01234), _text(1234.5), _text(12), _text("")
    ('0.0123', '1234', '12', '')
    """
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"
