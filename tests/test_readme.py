"""The Python blocks of the README and of the pages in docs/ run, one after another, in an empty folder.

The README runs as a user would run it: in an interpreter of its own. All pages share one interpreter,
because imports take longer than the blocks. Each page is a script with a namespace of its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


#: Pages whose blocks cannot run here -> why. Every other page with a Python block runs.
NOT_RUN: dict[str, str] = {}
PAGES = sorted(
    page.name for page in (ROOT / "docs").glob("*.md") if BLOCK.search(page.read_text()))

#: Runs the scripts that are its arguments, and prints a JSON object: page -> its traceback, or None.
RUN_PAGES = """
import json, os, runpy, sys, tempfile, traceback
from contextlib import redirect_stdout
from pathlib import Path
failed = {}
for script in sys.argv[1:]:
    os.chdir(tempfile.mkdtemp(dir=os.path.dirname(script)))
    try:
        with redirect_stdout(sys.stderr):
            runpy.run_path(script)
        failed[Path(script).stem] = None
    except BaseException:
        failed[Path(script).stem] = traceback.format_exc()
print(json.dumps(failed))
"""


def python_blocks(markdown: str) -> list[str]:
    """Returns the contents of all ```python blocks."""
    return BLOCK.findall(markdown)


def script_of(blocks: list[str]) -> str:
    """Returns the blocks as one script. It imports torchvision first if a block may import it."""
    imports = ["from tests.support import import_torchvision", "import_torchvision()"]
    needed = any(name in block for block in blocks for name in ("torchvision", "transformers"))
    return "\n".join([*(imports if needed else []), *blocks])


def run(blocks: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the blocks in one namespace, in a separate interpreter; warnings are errors."""
    script = folder / "readme.py"
    script.write_text(script_of(blocks))
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


def run_pages(pages: dict[str, str], folder: Path) -> dict[str, str | None]:
    """Runs the blocks of pages, name -> Markdown, in one interpreter; returns name -> traceback."""
    scripts = []
    for name, markdown in pages.items():
        scripts.append(folder / f"{name}.py")
        scripts[-1].write_text(script_of(python_blocks(markdown)))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:`torch.jit", "-c", RUN_PAGES, *scripts],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    texts = {name: (ROOT / "docs" / name).read_text() for name in PAGES if name not in NOT_RUN}
    return run_pages(texts, tmp_path_factory.mktemp("pages"))


@pytest.mark.parametrize("name", PAGES)
def test_page_runs(name: str, pages: dict[str, str | None]) -> None:
    if name in NOT_RUN:
        pytest.skip(NOT_RUN[name])
    assert pages[name] is None, pages[name]


def test_each_page_has_its_own_namespace_and_a_page_that_fails_stops_no_other(tmp_path: Path) -> None:
    failed = run_pages({
        "one": "```python\nimport warnings\nx = 1\n```", "two": "```python\nprint(x)\n```",
        "three": "```python\nwarnings = __import__('warnings')\nwarnings.warn('old')\n```",
        "four": "```python\nopen('left_behind', 'w')\n```"}, tmp_path)
    assert failed["one"] is None and failed["four"] is None
    assert "NameError" in str(failed["two"]) and "UserWarning: old" in str(failed["three"])


def test_pages_that_do_not_run_exist() -> None:
    assert set(NOT_RUN) <= set(PAGES)
