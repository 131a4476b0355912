"""How much the robustness tests tried: shown at the end of a run, and quoted in the documentation."""

from collections import Counter

#: what -> how many, for the whole session.
COUNTS: Counter[str] = Counter()
