"""Prints tables of the measurements of public_models.py."""

import math
from collections import Counter
from statistics import median

from public_models_measure import MEASURED, Row
from tables import show_table

QUANTILES = (50, 75, 90, 95, 99)


def number(value: float) -> str:
    """Formats a number with three digits."""
    return f"{value:.3g}"


def mib(number_of_bytes: int) -> str:
    """Formats bytes in MiB."""
    return f"{number_of_bytes / 2**20:.1f}"


def quantile(values: list[float], percent: int) -> float:
    """Returns the smallest value with at least ``percent`` % of the values at or below it."""
    ordered = sorted(values)
    return ordered[max(math.ceil(percent / 100 * len(ordered)) - 1, 0)]


def line(source: str, rows: list[Row]) -> list[str]:
    """Returns the line of one source."""
    errors = [row.error_2 for row in rows]
    exact, stored = (sum(getattr(row, name) for row in rows) for name in ("exact_bytes", "stored_bytes"))
    return [
        source, str(len(rows)), *(number(quantile(errors, percent)) for percent in QUANTILES),
        *(str(sum(error > most for error in errors)) for most in (2, 10)),
        str(sum(row.error_8 > 0.1 for row in rows)), mib(exact), mib(stored),
        str(sum(bool(row.differs) for row in rows))]


def by_source(rows: list[Row]) -> dict[str, list[Row]]:
    """Sorts rows by source."""
    sources: dict[str, list[Row]] = {}
    for row in rows:
        sources.setdefault(row.model.partition("/")[0], []).append(row)
    return sources


def show_sources(rows: list[Row], markdown: bool) -> None:
    """Prints a line for each source, and a line for all."""
    titles = [
        "source", "models", *(f"error, {percent} %" for percent in QUANTILES), "above 2", "above 10",
        "8 bits above 0.1", "exact MiB", "stored MiB", "not bit-identical"]
    cells = [line(source, of_source) for source, of_source in by_source(rows).items()]
    show_table(titles, cells + [line("all", rows)] * (len(cells) > 1), markdown)


def show_ratios(rows: list[Row], markdown: bool) -> None:
    """Prints quartiles of the ratio of exact to stored bytes, and the share that stays exact."""
    titles = ["source", "models", "ratio, 25 %", "50 %", "75 %", "stays exact", "most of it in"]
    cells = []
    for source, of_source in by_source(rows).items():
        ratios = [row.exact_bytes / max(row.stored_bytes, 1) for row in of_source]
        shares = Counter[str]()
        for row in of_source:
            for operation, kept in row.kept.items():
                shares[operation] += kept / max(row.stored_bytes, 1) / len(of_source)
        most = ", ".join(f"{name} {share:.1%}" for name, share in shares.most_common(4))
        cells.append([
            source, str(len(of_source)),
            *(f"{quantile(ratios, percent):.2f}" for percent in (25, 50, 75)),
            f"{sum(shares.values()):.1%}", most])
    show_table(titles, cells, markdown)


def show_largest(rows: list[Row], markdown: bool, most: int = 10) -> None:
    """Prints the models with the largest error at 2 bits."""
    titles = [
        "model", "error, 2 bits", "8 bits", "ratio of bytes", "parameter with most of it", "its part"]
    largest = sorted(rows, key=lambda row: -row.error_2)[:most]
    show_table(titles, [[
        row.model, number(row.error_2), number(row.error_8),
        f"{row.exact_bytes / max(row.stored_bytes, 1):.2f}", row.worst, f"{row.worst_share:.0%}"]
        for row in largest], markdown)


def notes(rows: list[Row]) -> list[str]:
    """Returns sentences on models missing from the table, and on results that are not bit-identical."""
    found = [
        f"Not bit-identical: {row.model} ({'; '.join(row.differs)})." for row in rows if row.differs]
    missing = [row for row in rows if row.status != MEASURED]
    counts = Counter((row.model.partition("/")[0], row.status) for row in missing)
    for (source, status), count in counts.items():
        models = [
            row.model.partition("/")[2] for row in missing
            if (row.model.partition("/")[0], row.status) == (source, status)]
        found.append(f"Not in the table: {source}, {status}: {count} ({', '.join(models)}).")
    return found


def show(rows: list[Row], markdown: bool) -> None:
    """Prints everything, on the console or as Markdown."""
    measured = [row for row in rows if row.status == MEASURED]
    if measured:
        show_sources(measured, markdown)
        print()
        show_ratios(measured, markdown)
        print()
        show_largest(measured, markdown)
    for note in notes(rows):
        print(f"\n{note}")


def show_comparison(rows: list[Row], others: list[Row], markdown: bool) -> None:
    """Prints two files side by side; the models whose error changes most come first."""
    before = {row.model: row for row in others if row.status == MEASURED}
    pairs = [
        (row, before[row.model]) for row in rows if row.status == MEASURED and row.model in before]
    if not pairs:
        print("The files have no measured model in common.")
        return

    def change(a: float, b: float) -> float:
        return (a + 1e-12) / (b + 1e-12)

    pairs.sort(key=lambda pair: -abs(math.log(change(pair[0].error_2, pair[1].error_2))))
    show_table(
        ["model", "stored MiB", "other", "error, 2 bits", "other", "8 bits", "other"],
        [[a.model, mib(a.stored_bytes), mib(b.stored_bytes), number(a.error_2), number(b.error_2),
          number(a.error_8), number(b.error_8)] for a, b in pairs], markdown)
    stored, other = (sum(row.stored_bytes for row in side) for side in zip(*pairs))
    changes = [median(change(getattr(a, name), getattr(b, name)) for a, b in pairs)
               for name in ("error_2", "error_8")]
    print(
        f"\n{len(pairs)} models in both: {mib(stored)} MiB stored, {mib(other)} in the other file."
        f" The error is {changes[0]:.3f} times the other's at 2 bits, {changes[1]:.3f} times at 8 bits"
        " (medians).")
