"""Resolves names in docstrings and type hints.

Type hints and docstrings name a class by the module that defines it, or by its name alone. The site
documents it where users import it from: ``brevitas_bp.codec.base.Packed`` is ``brevitas_bp.Packed``.

* A name that the site documents once becomes a link, wherever it is defined.
* A name without a page, of a part that is not public or of another project, becomes code. It must exist.
* A name that does not exist is a warning.
"""

import builtins
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

PACKAGE = "brevitas_bp"
BACKLINK = re.compile(r'\.html#(brevitas_bp\.[\w.]+)"')
HIDDEN = "\ue000"         # a character that no text contains


def documented(env: BuildEnvironment, target: str) -> str | None:
    """Returns the full name of the only documented object of this name; with its class, or alone."""
    parts = target.split(".")
    for end in {".".join(parts[-2:]): None, parts[-1]: None}:
        found = [
            name for name in env.domains.python_domain.objects
            if name.startswith(f"{PACKAGE}.") and name.endswith(f".{end}")]
        if len(found) == 1:
            return found[0]
    return None


def is_at(value: Any, names: Sequence[str]) -> bool:
    """Whether a value has this attribute, or attribute of an attribute; fields of dataclasses count."""
    for name in names:
        if name in getattr(value, "__annotations__", {}) and not hasattr(value, name):
            return name == names[-1]
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


def can_be_imported(target: str) -> bool:
    """Whether a dotted name leads to a module or to something in it."""
    parts = target.split(".")
    for length in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        return is_at(module, parts[length:])
    return is_at(builtins, parts)


def exists(target: str, node: pending_xref) -> bool:
    """Whether a name can be imported, as it is, from its place, or from some module of the package."""
    place = ".".join(filter(None, (node.get("py:module"), node.get("py:class"))))
    if can_be_imported(target) or (place and can_be_imported(f"{place}.{target}")):
        return True
    ours = [module for name, module in sys.modules.items() if name.partition(".")[0] == PACKAGE]
    first, *rest = target.split(".")
    return any(first in vars(module) and is_at(vars(module)[first], rest) for module in ours)


def resolve(
        app: Sphinx, env: BuildEnvironment, node: pending_xref,
        content: nodes.TextElement) -> nodes.Node | None:
    """Returns a link, or the name as code; None if there is no such name."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].removeprefix("~").partition("[")[0]
    if not exists(target, node):
        return None
    foreign = can_be_imported(target) and not target.startswith(PACKAGE)
    name = None if foreign else documented(env, target)
    if name is None:
        return content
    place = env.domains.python_domain.objects[name]
    return make_refnode(app.builder, node["refdoc"], place.docname, place.node_id, [content], name)


def correct_backlinks(
        app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Corrects links of source pages: viewcode assumes that a module is documented under one name."""
    def corrected(link: re.Match[str]) -> str:
        name = link[1]
        if name not in app.env.domains.python_domain.objects:
            name = documented(app.env, name) or name
        return f'.html#{name}"'

    if pagename.startswith("_modules/"):
        context["body"] = BACKLINK.sub(corrected, context["body"])


def hide_colons(
        app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Hides colons of attributes' docstrings from napoleon, which takes words before one for a type."""
    if what in ("attribute", "property", "data") and lines:
        lines[0] = lines[0].replace(": ", f"{HIDDEN} ")


def show_colons(
        app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Undoes :func:`hide_colons` after napoleon."""
    lines[:] = [line.replace(HIDDEN, ":") for line in lines]


def skip_fields(
        app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Skips fields of named tuples: the docstring of the class has them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects the functions above; napoleon has the priority 500."""
    app.connect("missing-reference", resolve)
    app.connect("html-page-context", correct_backlinks)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-docstring", hide_colons, priority=100)
    app.connect("autodoc-process-docstring", show_colons, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
