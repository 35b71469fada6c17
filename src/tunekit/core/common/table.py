"""Tables, as plain text and as HTML: what `print` and a notebook show of plans, results and plugins."""

from collections.abc import Sequence
from html import escape


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


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as an HTML table, every cell escaped; the first of each row is its heading.

    >>> html_table(["name", "rank"], [["<b>", "8"]])
    '<table><tr><th>name</th><th>rank</th></tr><tr><th>&lt;b&gt;</th><td>8</td></tr></table>'
    """
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = [
        f"<th>{escape(name)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) for name, *cells in rows
    ]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in [head, *lines]) + "</table>"
