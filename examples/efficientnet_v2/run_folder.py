"""The folder of one run: its files, protection against overwriting, and the final figures."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoint import load_checkpoint, save_checkpoint
from faults import InputError
from files import append_json_line, read_json, read_json_lines, write_json

OWN_FILES = (
    "checkpoint.pt",
    "config.json",
    "log.jsonl",
    "memory.json",
    "result.json",
    "curves.png",
    "modules.png",
)


@dataclass(frozen=True)
class RunFolder:
    """One run on disk.

    Attributes:
        path: The folder.
        config: The identity knobs; a resumed run must have equal ones.
    """

    path: Path
    config: dict[str, Any]

    def refuse_existing_run(self) -> None:
        """Raise `InputError` if the folder already holds a run, so that no work is lost."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out {self.path}: expected a folder, got a file")
        found = [name for name in OWN_FILES if (self.path / name).exists()]
        if found:
            raise InputError(
                f"{self.path}: holds a run already ({found[0]}); pass --resume or --overwrite"
            )

    def start(self, knobs: dict[str, Any]) -> None:
        """Remove the files of an earlier run, and only those files; write `config.json`."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name in OWN_FILES:
            (self.path / name).unlink(missing_ok=True)
        write_json(self.path / "config.json", {**knobs, "torch": torch.__version__})

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint atomically."""
        save_checkpoint(self.path / "checkpoint.pt", self.config, state)

    def load(self) -> dict[str, Any]:
        """Return the state in the checkpoint."""
        return load_checkpoint(self.path / "checkpoint.pt", self.config)

    def log(self, row: dict[str, Any]) -> None:
        """Append the row of one epoch."""
        append_json_line(self.path / "log.jsonl", row)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per epoch; if a killed run repeated an epoch, return its last row."""
        rows = read_json_lines(self.path / "log.jsonl")
        return list({row["epoch"]: row for row in rows}.values())

    def set_memory(self, memory: dict[str, Any]) -> None:
        """Store the saved bytes of every module, as measured in the first step."""
        write_json(self.path / "memory.json", memory)

    def memory(self) -> dict[str, Any]:
        """Return what `set_memory` stored."""
        return read_json(self.path / "memory.json")

    def result(self) -> dict[str, Any] | None:
        """Return the final figures, or `None` if the run is not finished."""
        path = self.path / "result.json"
        return read_json(path) if path.is_file() else None

    def finish(self) -> dict[str, Any]:
        """Summarise the log in `result.json` and return the summary."""
        rows = self.rows()
        result = {"config": self.config, **summarise(rows)}
        write_json(self.path / "result.json", result)
        return result


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return final figures from the rows of all epochs; bytes are those of the last epoch."""
    last = rows[-1]
    timed = [row["seconds_per_step"] for row in rows if row["seconds_per_step"] is not None]
    return {
        "accuracy": last["test_accuracy"],
        "best_accuracy": max(row["test_accuracy"] for row in rows),
        "exact_bytes": last["exact_bytes"],
        "stored_bytes": last["stored_bytes"],
        "ratio": last["exact_bytes"] / max(1, last["stored_bytes"]),
        "seconds_per_step": statistics.median(timed) if timed else None,
    }
