"""The Python blocks of docs/published_codes.md run, one after another."""

from pathlib import Path

from tests.test_readme import ROOT, python_blocks, run


def test_the_page_of_published_codes_runs(tmp_path: Path) -> None:
    blocks = python_blocks((ROOT / "docs/published_codes.md").read_text())
    assert len(blocks) == 8
    done = run(blocks, tmp_path)
    assert done.returncode == 0, done.stderr
