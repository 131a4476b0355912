"""Tables of configs and fragments, made from the public lists of :mod:`brevitas_bp.quant`.

Configs are injectors. Their metaclass resolves attributes, so autodoc cannot read them.

``.. configs:: brevitas_bp.quant.act.affine`` is a table of the configs that this module lists in
``__all__``. With the option ``:stored:`` it says as what a config stores a tensor, and in how many bits
per element.
``.. configs:: brevitas_bp.quant`` with names in the body is a table of these names.
"""

import importlib
import inspect
import re
from typing import Any, ClassVar

import torch
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import OptionSpec

from brevitas_bp import codec_from
from brevitas_bp.kernels import use

NUMEL = 2**16


def summary_of(config: Any) -> str:
    """Returns the first paragraph of a config's own docstring, in one line."""
    text = inspect.cleandoc(type.__getattribute__(config, "__doc__") or "")
    return " ".join(text.partition("\n\n")[0].split())


def stored_as(config: Any) -> tuple[str, str]:
    """Returns the name of the codec, and its bits per element of a float32 tensor, metadata included."""
    codec = codec_from(config)
    x = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0))
    with use("reference"):
        packed = codec.encode(x, seed=0)
    return codec.name, f"{packed.nbytes * 8 / NUMEL:.3g}"


class Configs(SphinxDirective):
    """The directive ``configs``."""

    required_arguments = 1
    option_spec: ClassVar[OptionSpec] = {"stored": directives.flag}
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Returns a table with a row for each config."""
        module = importlib.import_module(self.arguments[0])
        names = " ".join(self.content).split() or module.__all__
        heads, widths = ["config", "what it is"], "35 65"
        if "stored" in self.options:
            heads, widths = [*heads, "stored as", "bits per element"], "40 31 15 14"
        lines = [
            ".. role:: name(raw)", "   :format: html", "",
            ".. list-table::", "   :header-rows: 1", "   :class: configs", f"   :widths: {widths}", ""]
        for row in [heads, *(self.row(module, name) for name in names)]:
            lines += [f"   {'* ' if i == 0 else '  '}- {cell}" for i, cell in enumerate(row)]
        return self.parse_text_to_nodes("\n".join(lines))

    def row(self, module: Any, name: str) -> list[str]:
        """Returns the cells of one config."""
        config = getattr(module, name)
        # A browser may break a name between its words.
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "<wbr>", name)
        cells = [f":name:`<code>{words}</code>`", summary_of(config)]
        return [*cells, *stored_as(config)] if "stored" in self.options else cells


def setup(app: Sphinx) -> dict[str, Any]:
    """Adds the directive."""
    app.add_directive("configs", Configs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
