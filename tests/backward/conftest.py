"""Fixtures shared by several files of these tests."""

import pytest

from brevitas_bp.backward import registry as rules


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes a test's registrations when the test ends."""
    for name in ("_by_name", "_by_object", "_by_method"):
        monkeypatch.setattr(rules, name, getattr(rules, name).copy())
    monkeypatch.setattr(rules, "_found", {})
