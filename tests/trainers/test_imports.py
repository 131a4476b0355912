"""The callbacks import their trainer when they are asked for, and say what is missing."""

import subprocess
import sys
from typing import Any

import pytest

from brevitas_bp import trainers


def test_importing_loads_no_trainer() -> None:
    code = (
        "import sys, brevitas_bp.trainers; "
        "sys.exit(bool({'lightning', 'transformers', 'accelerate'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", trainers.__all__)
def test_what_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = "lightning" if name.startswith("Lightning") else "transformers"
    monkeypatch.delitem(vars(trainers), name, raising=False)
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Missing(package), *sys.meta_path])
    with pytest.raises(ImportError, match=rf"trainers\.{name}: needs {package}.*pip install {package}"):
        getattr(trainers, name)


class Missing:
    """Finds nothing of one package, as if it were not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_other_names_are_unknown() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'KerasMemory'"):
        trainers.KerasMemory  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
