"""The Python blocks of docs/testing.md run, one after another, and its tables list every check."""

import re
from pathlib import Path

from brevitas_bp.testing import CODEC_CHECKS, ROUNDING_CHECKS
from tests.test_readme import ROOT, python_blocks, run

PAGE = (ROOT / "docs/testing.md").read_text()


def test_the_page_runs(tmp_path: Path) -> None:
    blocks = python_blocks(PAGE)
    assert len(blocks) >= 8
    done = run(blocks, tmp_path)
    assert done.returncode == 0, done.stderr
    for said in ("'mean'", "-0.0", "clips", "draws=", "would be seen"):
        assert said in done.stdout


def test_the_tables_list_every_check() -> None:
    listed = {name for row in re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
              for name in re.findall(r"`([a-z -]+)`", row)}
    assert listed >= set(CODEC_CHECKS) | set(ROUNDING_CHECKS)
    assert listed - set(CODEC_CHECKS) - set(ROUNDING_CHECKS) <= {
        "hoeffding", "bernstein", "normal", "seeds"}
