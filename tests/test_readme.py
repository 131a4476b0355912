"""The README's Python blocks run, one after another, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def python_blocks(markdown: str) -> list[str]:
    """Returns the contents of all ```python blocks."""
    return BLOCK.findall(markdown)


def run(blocks: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the blocks in one namespace, in a separate interpreter; warnings are errors."""
    imports = ["from tests.support import import_torchvision", "import_torchvision()"]
    lines = imports if any("torchvision" in block for block in blocks) else []
    script = folder / "readme.py"
    script.write_text("\n".join([*lines, *blocks]))
    return subprocess.run(
        [sys.executable, script.name], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_blocks_are_found_and_share_a_namespace(tmp_path: Path) -> None:
    markdown = "# Title\n```python\nx = 2\n```\n```bash\nexit\n```\n```python\nprint(x)\n```\n"
    blocks = python_blocks(markdown)
    assert blocks == ["x = 2\n", "print(x)\n"]
    done = run(blocks, tmp_path)
    assert (done.returncode, done.stdout) == (0, "2\n")


def test_block_that_fails_is_noticed(tmp_path: Path) -> None:
    assert run(["import brevitas_bp\nbrevitas_bp.nonsense\n"], tmp_path).returncode != 0


def test_readme_runs(tmp_path: Path) -> None:
    blocks = python_blocks((ROOT / "README.md").read_text())
    if not blocks:
        pytest.skip("README.md has no Python block yet")
    done = run(blocks, tmp_path)
    assert done.returncode == 0, done.stderr
