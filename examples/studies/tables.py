"""Prints a table, on the console or as Markdown for a page."""

from rich.console import Console
from rich.table import Table


def show_table(titles: list[str], cells: list[list[str]], markdown: bool, width: int = 140) -> None:
    """Prints rows of text under titles."""
    if markdown:
        for line in (titles, ["---"] * len(titles), *cells):
            print("| " + " | ".join(line) + " |")
        return
    table = Table(*titles)
    for line in cells:
        table.add_row(*line)
    Console(width=width).print(table)
