"""Pages lead to each other: links, anchors, the tree of pages, and names that the pages mention.

``make docs`` builds the whole site with warnings as errors. Tests here need no Sphinx, except where they
say so.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import brevitas_bp
from tests.test_readme import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("api/*.rst")])
TEXTS = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md"), *ROOT.glob(".github/**/*.md")])

CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#{1,4} (.+)$", re.MULTILINE)
TOCTREE = re.compile(r"^(?:```\{toctree\}|\.\. toctree::)\n(.*?)(?:^```$|\Z)", re.MULTILINE | re.DOTALL)


def anchors(markdown: str) -> set[str]:
    """Returns the anchors of headings, as code hosts and MyST make them."""
    found: set[str] = set()
    text = re.sub(r"^```.*?^```$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    for heading in HEADING.findall(text):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = name = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        number = 0
        while name in found:
            number += 1
            name = f"{slug}-{number}"
        found.add(name)
    return found


def links(markdown: str) -> Iterator[tuple[str, str]]:
    """Yields file and anchor of each relative link outside of code; either may be empty."""
    yield from LINK.findall(CODE.sub("`code`", markdown))


def broken(page: Path, markdown: str) -> list[str]:
    """Returns the relative links of a page that lead nowhere."""
    found = []
    for file, anchor in links(markdown):
        target = (page.parent / file).resolve() if file else page
        text = markdown if target == page else ""
        if not target.exists():
            found.append(file)
        elif anchor and target.suffix == ".md" and anchor not in anchors(text or target.read_text()):
            found.append(f"{file}#{anchor}")
    return found


def children(page: Path) -> list[Path]:
    """Returns the pages that the toctrees of a page name."""
    names = []
    for body in TOCTREE.findall(page.read_text()):
        lines = [line.strip() for line in body.splitlines()]
        names += [re.sub(r".*<(.*)>", r"\1", line) for line in lines if line and line[0] != ":"]
    return [next(iter(page.parent.glob(f"{name}.*")), page.parent / name) for name in names]


def reachable(page: Path) -> set[Path]:
    """Returns a page and all that its toctrees lead to."""
    return {page}.union(*(reachable(child) for child in children(page)))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_checks_find_what_is_wrong() -> None:
    page = DOCS / "start.md"
    text = "# Two `words`\n[a](#two-words) [b](#three) [c](no.md) [d](policy.md#nothing) `[e](code)`\n"
    assert anchors("# A\n# A\n```\n# B\n```\n# The [wrapper](x.md): `eval()`, again\n") == {
        "a", "a-1", "the-wrapper-eval-again"}
    assert broken(page, text) == ["#three", "no.md", "policy.md#nothing"]
    assert broken(page, "[a](policy.md#operations) [b](../README.md#extras) [c](https://x.org)") == []


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page, page.read_text()) == []


def test_every_page_is_in_the_tree_once() -> None:
    assert reachable(DOCS / "index.md") == set(PAGES)
    named = [child for page in PAGES for child in children(page)]
    assert sorted(named) == sorted(set(named))


def test_the_api_pages_have_every_public_name() -> None:
    """Names of the package, and all packages that have public lists."""
    api = "\n".join(page.read_text() for page in DOCS.glob("api/*.rst"))
    directive = re.compile(
        r"^\.\. auto(?:class|function|exception):: (?:brevitas_bp\.)?(\w+)$", re.MULTILINE)
    listed = set(directive.findall(api))
    assert listed >= {name for name in brevitas_bp.__all__ if not name.startswith("__")}
    packages = {
        name_of(path.parent).replace("/", ".") for path in (ROOT / "brevitas_bp").rglob("__init__.py")
        if "__all__" in path.read_text() and path.parent.name not in ("brevitas_bp", "quant", "act")}
    documented = set(re.findall(r"^\.\. automodule:: (\S+)$", api, re.MULTILINE))
    under_other_names = {"brevitas_bp.backward", "brevitas_bp.nn.auxiliary", "brevitas_bp.memory"}
    assert packages - documented == under_other_names


def test_the_table_of_configs_has_every_public_list() -> None:
    """Fragments by name, ready-made configs by the module that lists them."""
    page = (DOCS / "api" / "quant.rst").read_text()
    modules = set(re.findall(r"^\.\. configs:: brevitas_bp\.quant\.(\S+)$", page, re.MULTILINE))
    ours = {path.stem for path in (ROOT / "brevitas_bp/quant/act").glob("[a-z]*.py")}
    assert {module.removeprefix("act.") for module in modules} == ours | {"grad", "learned"}
    fragments = set(re.findall(r"\b[A-Z]\w+", page[page.index("Fragments\n"):page.index("Rotated and")]))
    source = (ROOT / "brevitas_bp/quant/base.py").read_text()
    assert set(re.findall(r"^class (\w+)\(", source, re.MULTILINE)) <= fragments


PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_extras_that_are_named_exist() -> None:
    """In messages, pages and examples. pip only warns of an extra that does not exist."""
    extras = set(PROJECT["optional-dependencies"])
    patterns = ("brevitas_bp/**/*.py", "docs/**/*.md", "examples/**/*.py", "*.md", "Makefile")
    texts = [path.read_text() for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()]
    group = re.compile(r'(?:brevitas-bp|"\.)\[([a-z, ]+)\]')
    groups = [found for text in texts for found in group.findall(text)]
    named = {extra.strip() for found in groups for extra in found.split(",")}
    assert {"cpu", "plan", "trainers"} <= named <= extras


def test_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    command = re.compile(r"`make ([a-z-]+)`|^make ([a-z-]+) +#", re.MULTILINE)
    named = {a or b for page in TEXTS for a, b in command.findall(page.read_text())}
    assert {"docs", "demo", "lint"} <= named <= targets


def test_templates_and_workflows_are_yaml() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    files = [*ROOT.glob(".github/**/*.yml"), ROOT / "CITATION.cff"]
    loaded = {path.name: yaml.safe_load(path.read_text()) for path in files}
    assert loaded["CITATION.cff"]["version"] == brevitas_bp.__version__
    assert set(loaded["ci.yml"]["jobs"]) >= {"lint", "pinned", "matrix", "docs", "package"}
    versions = loaded["ci.yml"]["jobs"]["matrix"]["strategy"]["matrix"]["python"]
    assert f">={versions[0]}" == PROJECT["requires-python"]
    claimed = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    assert claimed and claimed <= set(versions)


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("sphinx", reason="Sphinx is not installed; the extra 'docs' has it")
    monkeypatch.syspath_prepend(DOCS / "_extensions")
    return __import__("repository")


def test_links_out_of_docs_are_rewritten_for_the_site(repository: Any) -> None:
    shown = {ROOT / "CHANGELOG.md": DOCS / "changelog.md"}
    text = "[a](../examples/minimal.py) [b](../CHANGELOG.md#x) [c](policy.md) `[d](U)` [e](#f)\n"
    assert repository.relink(text, DOCS, DOCS / "start.md", shown) == (
        "[a](source:examples/minimal.py) [b](changelog.md#x) [c](policy.md) `[d](U)` [e](#f)\n")
    page = DOCS / "contributing.md"
    assert repository.relink("[a](docs/policy.md)", ROOT, page, shown) == "[a](policy.md)"


def test_notebooks_become_pages(repository: Any) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# T\n", "text"]},
        {"cell_type": "code", "source": ["x = 1"]}]
    page = "# T\ntext\n\n```python\nx = 1\n```\n"
    assert repository.markdown_of_notebook(json.dumps({"cells": cells})) == page
