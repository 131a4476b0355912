"""Files outside of docs/: pages that show one of them, and links to them.

* ``show: ../CHANGELOG.md`` in the front matter of a page puts this file in the place of the page. A
  notebook becomes a page without outputs.
* A link to a file that a page shows leads to that page.
* A link to any other file outside of docs/ leads to the repository if ``repository_url`` is set.
  Otherwise the site has a page with the source of the file.

* A docstring that names docs/policy.md links to it.

Links therefore work on a code host and on the site alike. A link to a file that does not exist is a
warning.
"""

import json
import os
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.builders.html import StandaloneHTMLBuilder
from sphinx.util import logging

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SHOW = re.compile(r"\A---\nshow: (\S+)\n---\n")
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
PAGE = re.compile(r"(?:``)?\bdocs/(\w+)\.md(?:``)?")
SCHEME = "source:"

logger = logging.getLogger(__name__)


def shown_files() -> dict[Path, Path]:
    """Returns the files that pages show -> the page."""
    pages = {}
    for page in DOCS.glob("*.md"):
        if shown := SHOW.match(page.read_text()):
            pages[(DOCS / shown[1]).resolve()] = page
    return pages


def markdown_of_notebook(text: str) -> str:
    """Returns the cells of a notebook as Markdown."""
    cells = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        cells.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(cells) + "\n"


def relink(text: str, folder: Path, page: Path, shown: dict[Path, Path]) -> str:
    """Returns Markdown whose links lead to pages of the site, or have the scheme ``source``.

    Args:
        text: Markdown.
        folder: where the links start.
        page: the page that will hold the text.
        shown: the result of :func:`shown_files`.
    """
    def new_link(link: re.Match[str]) -> str:
        target = (folder / link[1]).resolve()
        anchor = link[2] or ""
        if not target.exists():
            docname = page.relative_to(DOCS).with_suffix("").as_posix()
            logger.warning("there is no file %s", link[1], location=docname)
            return link[0]
        target = shown.get(target, target)
        if target.is_relative_to(DOCS):
            return f"]({os.path.relpath(target, page.parent)}{anchor})"
        return f"]({SCHEME}{target.relative_to(ROOT).as_posix()}{anchor})"

    parts = CODE.split(text)
    return "".join(part if part.startswith("`") else LINK.sub(new_link, part) for part in parts)


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    """Puts the file in the place of a page that shows it, and rewrites links that leave docs/."""
    page = Path(app.env.doc2path(docname))
    if page.suffix != ".md":
        return
    text, folder = source[0], page.parent
    if shown := SHOW.match(text):
        file = (page.parent / shown[1]).resolve()
        app.env.note_dependency(str(file))
        text, folder = file.read_text(), file.parent
        if file.suffix == ".ipynb":
            text = markdown_of_notebook(text)
    source[0] = relink(text, folder, page, shown_files())


def link_pages(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Makes links of pages that docstrings name."""
    lines[:] = [PAGE.sub(r":doc:`docs/\1.md </\1>`", line) for line in lines]


def source_page(path: str) -> str:
    """Returns the name of the page that holds the source of a file or folder."""
    return f"source/{path}"


def resolve(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Gives links with the scheme ``source`` their address."""
    url = app.config.repository_url
    for node in doctree.findall(nodes.reference):
        if node.get("refuri", "").startswith(SCHEME):
            path, _, anchor = node["refuri"].removeprefix(SCHEME).partition("#")
            if url:
                node["refuri"] = f"{url}/blob/main/{path}" + (f"#{anchor}" if anchor else "")
            else:
                node["refuri"] = app.builder.get_relative_uri(docname, source_page(path))
                node["internal"] = True


def linked(app: Sphinx) -> set[str]:
    """Returns the files and folders to which pages link."""
    found = set()
    for docname in app.env.found_docs:
        for node in app.env.get_doctree(docname).findall(nodes.reference):
            if node.get("refuri", "").startswith(SCHEME):
                found.add(node["refuri"].removeprefix(SCHEME).partition("#")[0])
    return found


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yields a page for each file to which the site links, and for the files of each linked folder."""
    if not isinstance(app.builder, StandaloneHTMLBuilder) or app.config.repository_url:
        return
    todo, done = sorted(linked(app)), set()
    while todo:
        path = todo.pop()
        if path in done:
            continue
        done.add(path)
        file = ROOT / path
        if file.is_dir():
            files = (entry for entry in file.iterdir() if entry.suffix in (".py", ".md"))
            inside = sorted(entry.relative_to(ROOT).as_posix() for entry in files)
            todo += inside
            items = "".join(
                f'<li><a href="{app.builder.get_relative_uri(source_page(path), source_page(name))}">'
                f"{escape(name)}</a></li>" for name in inside)
            body = f"<ul>{items}</ul>"
        else:
            language = {".py": "python", ".toml": "toml", ".md": "markdown"}.get(file.suffix, "text")
            body = app.builder.highlighter.highlight_block(file.read_text(), language, linenos=False)
        title = escape(path)
        yield source_page(path), {"title": title, "body": f"<h1>{title}</h1>{body}"}, "page.html"


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects the functions above."""
    app.add_config_value("repository_url", "", "env", [str])
    app.connect("source-read", read)
    app.connect("doctree-resolved", resolve)
    app.connect("autodoc-process-docstring", link_pages)
    app.connect("html-collect-pages", source_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
