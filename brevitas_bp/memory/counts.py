"""What counts of saved tensors have in common: rows, groups, totals, text, a picture."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from brevitas_bp.memory.picture import plot_saved_memory
from brevitas_bp.memory_tables import (
    Counted,
    HasRatio,
    SavedMemoryTable,
    Sort,
    add,
    grouped,
    ratio_text,
)
from brevitas_bp.text import mib, table

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SavedMemoryRow(HasRatio):
    """Saved tensors of one module, operation and dtype.

    Attributes:
        module: qualified name; empty for the root and for operations outside the root.
        op: the torch function that saved the tensors.
        dtype: of the tensors.
        tensors: number of tensors; each is counted once.
        exact_bytes: bytes of the tensors as plain autograd would keep them.
        stored_bytes: bytes that are kept instead.
    """

    module: str
    op: str
    dtype: str
    tensors: int
    exact_bytes: int
    stored_bytes: int


class SavedMemory(HasRatio, ABC):
    """Counted saved tensors."""

    @abstractmethod
    def _counted(self) -> Counted:
        """Returns the counts."""

    @property
    def rows(self) -> list[SavedMemoryRow]:
        """One row per module, operation and dtype, in the order of the forward pass."""
        found: dict[tuple[str, str, str], list[int]] = {}
        for (module, op, dtype, _), numbers in self._counted().items():
            add(found.setdefault((module, op, dtype), [0, 0, 0]), numbers)
        return [SavedMemoryRow(*key, *numbers) for key, numbers in found.items()]

    def by(
            self, *columns: str, top: int | None = None,
            sort: Sort = "stored") -> SavedMemoryTable:
        """Groups the saved tensors, for instance ``by("op")`` or ``by("module", "reason", top=10)``.

        Args:
            *columns: some of "module", "op", "dtype", "reason". The reason is that of the policy.
            top: number of groups to show; the others become one. None: all.
            sort: what the first group has most of: "stored" or "exact" bytes, or "tensors"; "forward" is
                the order of the forward pass.

        Returns:
            A table, which ``print`` shows.

        Raises:
            UnknownNameError: there is no such column, or no such order.
            ValueError: no column is given, or ``top`` is below 1.
        """
        return grouped(self._counted(), columns, top, sort)

    def plot(
            self, *, by: str = "module", top: int | None = 20, path: str | Path | None = None) -> Figure:
        """Draws the bytes of plain autograd and the stored bytes, most stored bytes on top.

        Args:
            by: "module", "op", "dtype" or "reason": what has a bar of its own.
            top: number of bars; the rest is one more bar, "other". None: a bar for each.
            path: file to write; the extension chooses the format. None: write no file.

        Raises:
            ImportError: matplotlib is not installed.
            UnknownNameError: there is no such column.
            ValueError: nothing is saved, or ``top`` is below 1.
        """
        return plot_saved_memory(grouped(self._counted(), (by,), top), path)

    def _totals(self) -> list[int]:
        """Returns the number of tensors, exact bytes and stored bytes of all."""
        totals = [0, 0, 0]
        for numbers in self._counted().values():
            add(totals, numbers)
        return totals

    @property
    def tensors(self) -> int:
        """Number of saved tensors."""
        return self._totals()[0]

    @property
    def exact_bytes(self) -> int:
        """Bytes that plain autograd would keep."""
        return self._totals()[1]

    @property
    def stored_bytes(self) -> int:
        """Bytes that are really kept."""
        return self._totals()[2]

    def to_dict(self) -> dict[str, Any]:
        """Returns rows and total as plain values, for JSON. An undefined ratio is None."""
        tensors, exact, stored = self._totals()
        total = {
            "tensors": tensors, "exact_bytes": exact, "stored_bytes": stored,
            "ratio": exact / stored if stored else None}
        return {
            "rows": [{**asdict(r), "ratio": _number(r.ratio)} for r in self.rows], "total": total}

    def __str__(self) -> str:
        lines = [("module", "op", "dtype", "tensors", "exact MiB", "stored MiB", "ratio")]
        for row in self.rows:
            lines.append((
                row.module or "(root)", row.op, row.dtype, str(row.tensors),
                mib(row.exact_bytes), mib(row.stored_bytes),
                ratio_text(row.exact_bytes, row.stored_bytes)))
        tensors, exact, stored = self._totals()
        lines.append((
            "total", "", "", str(tensors), mib(exact), mib(stored), ratio_text(exact, stored)))
        return table(lines, left=3, total=True)


class SavedMemoryStep(SavedMemory):
    """What one training step kept for backward, at the moment when it kept most.

    In most loops, that moment is the end of the forward pass. Made by
    :attr:`SavedMemoryReport.last_step`.
    """

    def __init__(self, counted: Counted) -> None:
        self._counts = counted

    def _counted(self) -> Counted:
        return self._counts


def _number(x: float) -> float | None:
    return None if math.isnan(x) else x
