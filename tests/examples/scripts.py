"""Imports benchmarks, which import each other as plain modules, as when run."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

FOLDER = str(Path(__file__).parents[2] / "examples" / "benchmarks")


def benchmark(name: str) -> ModuleType:
    """Imports a script of examples/benchmarks.

    Their folder does not stay on the path. ``kernels`` is also the name of a package, and transformers
    would believe that it is installed.
    """
    sys.path.insert(0, FOLDER)
    try:
        return importlib.import_module(f"examples.benchmarks.{name}")
    finally:
        sys.path.remove(FOLDER)
