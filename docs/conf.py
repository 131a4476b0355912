"""Sphinx settings of the documentation site: ``make docs`` builds it into build/docs."""

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_extensions")]

import brevitas_bp  # noqa: E402 - after the path

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = "brevitas_bp"
author = PROJECT["authors"][0]["name"]
copyright = f"2026, {author}"
version = release = brevitas_bp.__version__

extensions = [
    "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon",
    "sphinx.ext.viewcode", "repository", "configs", "exported_names"]
exclude_patterns = ["_extensions"]
nitpicky = True
# matplotlib is imported for type checkers alone.
nitpick_ignore = [("py:class", "Figure")]

# Links between pages name headings as code hosts do.
myst_heading_anchors = 4
myst_url_schemes = {"http": None, "https": None, "mailto": None, "source": None}
# Empty as long as the project has no public address: then the site has pages of the files it links to.
repository_url = PROJECT.get("urls", {}).get("Repository", "")

# Blocks without a language are commands and outputs.
highlight_language = "text"

toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 90
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True, "show-inheritance": True}
autosummary_generate = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "pydata_sphinx_theme"
html_title = f"brevitas_bp {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
# Pages that are alone in their section have nothing to list at their side.
html_sidebars = {page: [] for page in ("index", "start", "concepts", "choosing", "changelog")}
html_theme_options = {
    "header_links_before_dropdown": 10,
    "navbar_persistent": ["search-button"],
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "show_nav_level": 1,
    "navbar_align": "left",
    "footer_start": ["copyright"],
    "footer_end": [],
    **({"icon_links": [{"name": "Repository", "url": repository_url, "icon": "fa-solid fa-code-branch"}]}
       if repository_url else {}),
}
linkcheck_timeout = 20
linkcheck_anchors = False
linkcheck_ignore = ["source:.*"]
