"""The example of learned quantization: it resumes, and draws its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "learned_quantization" / "run.py"


def started(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), "--seeds", "1", *arguments],
        capture_output=True, text=True, cwd=out.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = started(out, "--limit", "1")
    assert first.returncode == 0, first.stderr
    (row,) = rows_of(out)
    assert row["run"]["strength"] == 0 and row["distinct"] > 10_000
    with (out / "results.jsonl").open("a") as file:
        file.write('{"run": {"setting"')  # killed here
    second = started(out, "--limit", "1", "--markdown")
    assert second.returncode == 0, second.stderr
    assert "drops an unfinished line" in second.stdout and "| digits | scratch | lam |" in second.stdout
    rows = rows_of(out)
    assert rows[0] == row and rows[1]["run"]["strength"] == 1e-12
    assert rows[1]["distinct"] < row["distinct"]
    assert (out / "learned_lam.png").stat().st_size > 10_000


def test_data_that_are_not_there(tmp_path: Path) -> None:
    done = started(tmp_path / "out", "--data-dir", str(tmp_path), "--limit", "0")
    assert done.returncode == 2 and "Fashion-MNIST not found" in done.stderr
