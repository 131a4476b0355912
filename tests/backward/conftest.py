"""Fixtures shared by several files of these tests."""

import pytest

from brevitas_bp.backward import operations


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes a test's registrations when the test ends."""
    for name in ("_by_name", "_by_object", "_by_method"):
        monkeypatch.setattr(operations, name, getattr(operations, name).copy())
    monkeypatch.setattr(operations, "_found", {})
