"""Saved tensors in groups: by module, operation, dtype or reason."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from brevitas_bp.errors import UnknownNameError, nearest
from brevitas_bp.text import mib, table

#: Columns to group by. Their values are a key, in this order.
COLUMNS: tuple[str, ...] = ("module", "op", "dtype", "reason")
Key = tuple[str, str, str, str]
#: Key -> number of tensors, exact bytes, stored bytes.
Counted = dict[Key, list[int]]
#: What comes first in a table.
Sort = Literal["stored", "exact", "tensors", "forward"]
#: Its index among the numbers; None: the order in which tensors were saved.
_ORDERS: dict[str, int | None] = {"stored": 2, "exact": 1, "tensors": 0, "forward": None}


class HasRatio:
    """What has exact and stored bytes has a ratio."""

    exact_bytes: Any
    stored_bytes: Any

    @property
    def ratio(self) -> float:
        """Exact bytes over stored bytes."""
        return self.exact_bytes / self.stored_bytes if self.stored_bytes else float("nan")


@dataclass(frozen=True)
class SavedMemoryGroup(HasRatio):
    """Saved tensors that agree in some columns.

    Attributes:
        values: column -> value, for the columns that the tensors were grouped by.
        tensors: number of tensors.
        exact_bytes: bytes of the tensors as plain autograd would keep them.
        stored_bytes: bytes that are kept instead.
    """

    values: dict[str, str]
    tensors: int
    exact_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class SavedMemoryTable:
    """Groups of saved tensors. Made by :meth:`SavedMemoryReport.by`.

    Attributes:
        columns: what the tensors were grouped by.
        groups: the groups; those with most stored bytes first, if nothing else was asked for.
        rest: the groups that ``top`` left out, as one group; None if there are none.
    """

    columns: tuple[str, ...]
    groups: list[SavedMemoryGroup]
    rest: SavedMemoryGroup | None

    def __str__(self) -> str:
        shown = [*self.groups, *([] if self.rest is None else [self.rest])]
        exact, stored = sum(g.exact_bytes for g in shown), sum(g.stored_bytes for g in shown)
        lines = [(*self.columns, "tensors", "exact MiB", "stored MiB", "of all", "ratio")]
        for group in shown:
            lines.append((
                *(group.values[column] or "(root)" for column in self.columns), str(group.tensors),
                mib(group.exact_bytes), mib(group.stored_bytes),
                f"{group.stored_bytes / stored:.1%}" if stored else "-",
                ratio_text(group.exact_bytes, group.stored_bytes)))
        lines.append((
            "total", *[""] * (len(self.columns) - 1), str(sum(g.tensors for g in shown)), mib(exact),
            mib(stored), "100.0%" if stored else "-", ratio_text(exact, stored)))
        return table(lines, left=len(self.columns), total=True)


def grouped(
        counted: Mapping[Key, Sequence[int]], columns: tuple[str, ...], top: int | None,
        sort: Sort = "stored") -> SavedMemoryTable:
    """Groups counts; see :meth:`brevitas_bp.SavedMemoryReport.by`.

    Raises:
        UnknownNameError: there is no such column, or no such order.
        ValueError: no column is given, or ``top`` is below 1.
    """
    where = "brevitas_bp.SavedMemoryReport.by"
    for column in columns:
        if column not in COLUMNS:
            raise UnknownNameError(
                f"{where}: expected columns out of {list(COLUMNS)}, got {column!r}"
                f"{nearest(str(column), COLUMNS)}")
    if sort not in _ORDERS:
        raise UnknownNameError(
            f"{where}: sort must be one of {list(_ORDERS)}, got {sort!r}{nearest(str(sort), _ORDERS)}")
    if not columns or (top is not None and top < 1):
        raise ValueError(
            f"{where}: expected one column or more, and a top of 1 or more, got {columns!r} and {top!r}")
    groups: dict[tuple[str, ...], list[int]] = {}
    for key, numbers in counted.items():
        values = dict(zip(COLUMNS, key))
        add(groups.setdefault(tuple(values[column] for column in columns), [0, 0, 0]), numbers)
    ordered = list(groups.items())
    if (number := _ORDERS[sort]) is not None:
        ordered.sort(key=lambda item: -item[1][number])
    made = [SavedMemoryGroup(dict(zip(columns, values)), *n) for values, n in ordered]
    if top is None or len(made) <= top:
        return SavedMemoryTable(columns, made, None)
    rest = [0, 0, 0]
    for _, numbers in ordered[top:]:
        add(rest, numbers)
    name = f"{len(made) - top} more"
    others = SavedMemoryGroup({c: name if c == columns[0] else " " for c in columns}, *rest)
    return SavedMemoryTable(columns, made[:top], others)


def add(to: list[int], numbers: Sequence[int]) -> None:
    """Adds numbers, one by one."""
    for i, number in enumerate(numbers):
        to[i] += number


def ratio_text(exact: int, stored: int) -> str:
    """Formats a ratio. A row without exact bytes of its own shares those of another row."""
    if stored and not exact:
        return "shared"
    return f"{exact / stored:.2f}" if stored else "-"
