"""The Python blocks of docs/auxiliary.md run."""

from pathlib import Path

from tests.test_readme import ROOT, python_blocks, run


def test_the_page_runs(tmp_path: Path) -> None:
    blocks = python_blocks((ROOT / "docs/auxiliary.md").read_text())
    assert len(blocks) > 4
    done = run(blocks, tmp_path)
    assert done.returncode == 0, done.stderr
