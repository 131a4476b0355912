"""Runs notebooks without Jupyter, and writes what their cells print, return and draw into them.

    python examples/notebooks/execute.py examples/notebooks/*.ipynb

A code host then shows the outputs. Lines that begin with % are for Jupyter, and are left out.
"""

import ast
import base64
import io
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def run_cell(source: str, namespace: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Runs the source of a cell in a namespace; returns its outputs in the format of notebooks."""
    tree = ast.parse("\n".join(
        "" if line.startswith("%") else line for line in source.splitlines()), name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        value = None
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({
            "name": "stdout", "output_type": "stream",
            "text": printed.getvalue().splitlines(keepends=True)})
    if value is not None:
        outputs.append({
            "data": _data_of(value), "metadata": {}, "output_type": "display_data"})
    return outputs


def _data_of(value: Any) -> dict[str, Any]:
    if not isinstance(value, Figure):
        return {"text/plain": repr(value).splitlines(keepends=True)}
    drawn = io.BytesIO()
    value.savefig(drawn, format="png", dpi=80)
    return {
        "image/png": base64.b64encode(drawn.getvalue()).decode(),
        "text/plain": ["<Figure>"]}


def execute(path: Path) -> None:
    """Runs the cells of a notebook in one namespace, and writes their outputs into the file."""
    notebook = json.loads(path.read_text())
    namespace: dict[str, Any] = {"__name__": path.stem}
    number = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            number += 1
            cell["outputs"] = run_cell("".join(cell["source"]), namespace, f"cell {number}")
            cell["execution_count"] = number
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    for name in sys.argv[1:]:
        start = time.perf_counter()
        execute(Path(name))
        print(f"{name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
