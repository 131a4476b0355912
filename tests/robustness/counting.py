"""Counts of what the robustness tests tried: printed after a run, and quoted in the documentation."""

from collections import Counter

#: event -> count, for the whole session.
COUNTS: Counter[str] = Counter()
