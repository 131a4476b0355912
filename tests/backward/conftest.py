"""Fixtures that several files of these tests share."""

import pytest

from brevitas_bp.backward import operations


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations of a test end with it."""
    for name in ("_by_name", "_by_object"):
        monkeypatch.setattr(operations, name, dict(getattr(operations, name)))
    monkeypatch.setattr(operations, "_found", {})
