"""Tables and numbers as text, for printing."""

from collections.abc import Sequence


def table(lines: Sequence[tuple[str, ...]], left: int, total: bool = False) -> str:
    """Formats lines of cells as aligned columns, with a rule under the first line.

    Args:
        lines: the heading, then one line for each row.
        left: number of columns, from the left, that are flush left. The others are flush right.
        total: whether the last line is a total, which gets a rule above it.

    Example:
        >>> print(table([("what", "MiB"), ("conv", "1.5"), ("total", "1.5")], left=1, total=True))
        what   MiB
        ----------
        conv   1.5
        ----------
        total  1.5
    """
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(
        cell.ljust(width) if i < left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines]
    rule = "-" * max(len(line) for line in text)
    body = [*text[1:-1], rule, text[-1]] if total else text[1:]
    return "\n".join([text[0], rule, *body])


def mib(nbytes: int) -> str:
    """Formats a number of bytes in MiB, with three decimals."""
    return f"{nbytes / 2**20:.3f}"


def short_mib(nbytes: int) -> str:
    """Formats a number of bytes in MiB, with three digits or more.

    >>> short_mib(5 * 2**20 // 2), short_mib(2**27), short_mib(0), short_mib(1000)
    ('2.50 MiB', '128 MiB', '0.00 MiB', '0.001 MiB')
    """
    size = nbytes / 2**20
    decimals = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.01 or not nbytes else 3
    return f"{size:.{decimals}f} MiB"
