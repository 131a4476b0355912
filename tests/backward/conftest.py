"""Fixtures that several files of these tests share."""

import pytest

from brevitas_bp.backward import operations


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations of a test end with it."""
    for name in ("_by_name", "_by_object", "_by_method"):
        monkeypatch.setattr(operations, name, getattr(operations, name).copy())
    monkeypatch.setattr(operations, "_found", {})
