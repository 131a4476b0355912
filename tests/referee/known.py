"""What is known to differ, and why. A line here that no longer fails makes the run fail."""

#: policy -> (operator, variant) -> reason.
KNOWN: dict[str, dict[tuple[str, str], str]] = {}
