"""Prints the counts of the robustness tests."""

from typing import Any

from tests.robustness.counting import COUNTS


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name, count in sorted(COUNTS.items()):
        terminalreporter.write_line(f"robustness: {count} {name}")
