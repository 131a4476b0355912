"""The figures of a report that trainers log."""

from collections.abc import Sequence

from brevitas_bp.errors import UnknownNameError, nearest
from brevitas_bp.memory import SavedMemoryReport

#: Figure -> unit or meaning.
FIGURES = {
    "saved_mib": "MiB stored by the newest step, when it kept most",
    "saved_exact_mib": "MiB that plain autograd would have kept instead",
    "saved_ratio": "the second over the first",
    "saved_peak_mib": "most MiB stored at once since training began",
    "saved_live_mib": "MiB stored now"}
USUAL = ("saved_mib", "saved_ratio", "saved_peak_mib")


def figures_of(report: SavedMemoryReport, names: Sequence[str]) -> dict[str, float]:
    """Returns the named figures; none before the first step."""
    step = report.last_step
    if step is None:
        return {}
    exact, stored = step.exact_bytes, step.stored_bytes
    values = {
        "saved_mib": stored / 2**20, "saved_exact_mib": exact / 2**20,
        "saved_ratio": exact / stored if stored else 1.0,
        "saved_peak_mib": report.peak_bytes / 2**20, "saved_live_mib": report.live_bytes / 2**20}
    return {name: values[name] for name in names}


def check_names(where: str, names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of figures.

    Raises:
        UnknownNameError: there is no such figure.
    """
    for name in names:
        if name not in FIGURES:
            raise UnknownNameError(
                f"{where}: expected figures out of {list(FIGURES)}, got {name!r}"
                f"{nearest(str(name), FIGURES)}")
    return tuple(names)
