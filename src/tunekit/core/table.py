"""Plain-text tables: what `print` shows of plans, results and plugins."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns under a ruled header; no trailing blanks.

    >>> print(table(["name", "rank"], [["lora", "8"]]))
    name  rank
    ----  ----
    lora  8
    """
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
