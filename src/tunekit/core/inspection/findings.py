"""What is wrong with data: where, why, and whether a run would stop there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from textwrap import wrap
from typing import Any, Literal

import attrs

from tunekit.errors import DataError

WIDTH = 100
"""Columns of a printed report."""
SHOWN = 3
"""So many places of a group are printed; the report holds them all."""
GROUPS = 20
"""So many groups of each severity are printed."""

_WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
"""How places are wrapped: a path is never cut."""
_PLACE = re.compile(r"([^:]+:\d+): (.*)", re.DOTALL)
_FIELD = re.compile(r"(.*) \(([^\s()]+)\)", re.DOTALL)


@attrs.frozen
class Finding:
    """One problem of the data; prints as `file:line: reason (field)`.

    Args:
        place: `file:line` or `row N`; the file where it concerns all rows; empty where that is not known.
        reason: what is wrong.
        field: the column, or the part of it; empty for the row as a whole.
        severity: "error" stops a run, with a "warning" it goes on.
        group: the reason without what differs from row to row.
        split: "train" or "validation".
        left_out: whether a run cannot take the row.
    """

    place: str
    reason: str
    field: str = ""
    severity: Literal["error", "warning"] = "warning"
    group: str = attrs.field(kw_only=True)
    split: str = attrs.field(default="train", kw_only=True)
    left_out: bool = attrs.field(default=False, kw_only=True)

    def __str__(self) -> str:
        place = f"{self.place}: " if self.place else ""
        return f"{place}{self.reason}{f' ({self.field})' if self.field else ''}"

    @group.default
    def _without_numbers(self) -> str:
        return re.sub(r"\b\d+\b", "N", f"{self.reason}{f' ({self.field})' if self.field else ''}")


@attrs.frozen(kw_only=True)
class Group:
    """Problems of one kind.

    Args:
        reason: what they have in common.
        severity: "error" or "warning".
        count: how many there are.
        places: where they are, each once, in the order in which they were found.
    """

    reason: str
    severity: str
    count: int
    places: tuple[str, ...]

    def __str__(self) -> str:
        # A reason may quote the data: whatever line breaks that holds, the report has its own.
        lines = [*wrap(" ".join(self.reason.split()), WIDTH - 10), *wrap(self._where(), WIDTH - 10, **_WHOLE)]
        return "\n".join([f"{self.count:>8,}  {lines[0]}", *(f"{'':10}{line}" for line in lines[1:])])

    def _where(self) -> str:
        """The first places; of those in one file, the name once."""
        shown, before = [], None
        for place in self.places[:SHOWN]:
            stem = place.rstrip("0123456789")
            shown.append(place.removeprefix(stem) if stem == before else place)
            before = stem
        if self.count > len(self.places):
            return ", ".join([*shown, *([f"... in all {len(self.places):,} rows"] if len(self.places) > SHOWN else [])])
        return ", ".join([*shown, *([f"and {self.count - SHOWN:,} more"] if self.count > SHOWN else [])])


def from_error(error: DataError, place: str, split: str, *, stops: bool) -> Finding:
    """The finding that an error about the row at `place` stands for; `stops` says whether a run would stop there."""
    reason = str(error).removeprefix(f"{place}: ")
    file = file_of(place)
    if file and reason.startswith(f"{file}: "):  # about the file, not about a line of it
        place, reason = file, reason.removeprefix(f"{file}: ")
    elif place.startswith("row ") and (known := _PLACE.fullmatch(reason)):  # the row knows better where it stands
        place, reason = known.groups()
    parts = _FIELD.fullmatch(reason)
    text, field = parts.groups() if parts else (reason, "")
    severity: Literal["error", "warning"] = "error" if stops else "warning"
    return Finding(place, text, field, severity, split=split, left_out=True)


def file_of(place: str) -> str:
    """The file of a `file:line`; empty for `row N`."""
    file, _, line = place.rpartition(":")
    return file if line.isdecimal() else ""


def grouped(findings: Sequence[Finding]) -> tuple[Group, ...]:
    """The findings by reason: errors first, then the most frequent first."""
    places: dict[tuple[str, str], Counter[str]] = {}
    for finding in findings:
        places.setdefault((finding.severity, finding.group), Counter())[finding.place] += 1
    groups = [
        Group(reason=reason, severity=severity, count=where.total(), places=tuple(where))
        for (severity, reason), where in places.items()
    ]
    return tuple(sorted(groups, key=lambda group: (group.severity, -group.count)))


def listing(title: str, groups: Sequence[Group]) -> str:
    """Groups under a title, as they are printed; empty where there are none."""
    if not groups:
        return ""
    more = [f"          and {len(groups) - GROUPS:,} other reasons"] if len(groups) > GROUPS else []
    return "\n".join([title, *map(str, groups[:GROUPS]), *more])


def many(count: int, what: str) -> str:
    """A count with its noun: "1 row", "2 rows"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
