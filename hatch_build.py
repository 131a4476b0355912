"""Makes the readme of the package of README.md, for places where docs/ does not stand beside it.

In README.md, links to files of the project are relative, so that they work on every code host and in a
checkout. A package index has no such files. There the links lead to the repository, if
``[project.urls]`` in pyproject.toml names one. Otherwise only their text is left.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

#: A link or an image whose target is neither an address nor an anchor.
RELATIVE = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def absolute(markdown: str, repository: str) -> str:
    """Returns Markdown without relative links.

    >>> absolute("[policy](docs/policy.md#bits), [torch](https://pytorch.org)", "https://example.org/x")
    '[policy](https://example.org/x/blob/main/docs/policy.md#bits), [torch](https://pytorch.org)'
    >>> absolute("[policy](docs/policy.md), [extras](#extras)", "")
    'policy, [extras](#extras)'
    """
    def replaced(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        if not repository:
            return text
        return f"{image}[{text}]({repository}/{'raw' if image else 'blob'}/main/{target})"

    return RELATIVE.sub(replaced, markdown)


class ReadmeHook(MetadataHookInterface):
    """Sets the field ``readme``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """See hatchling's metadata hooks."""
        repository = metadata.get("urls", {}).get("Repository", "").rstrip("/")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, repository)}
