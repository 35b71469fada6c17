"""Reading a source: every row with its place, what is not used counted by reason, and which rows belong together."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from tunekit.core.interfaces import DataSource, Example
from tunekit.errors import DataError, LeftOut

Placed = tuple[str, Example]
"""A row and its place, `file:line` or `row N`."""

DIGEST_BYTES = 16

REASONS = 12
"""So many reasons are told apart for each split; the rest is counted as one, so that the table stays short."""


def held_out_in(source: DataSource, validation: float | DataSource | None) -> tuple[DataSource, str] | None:
    """Where held-out rows are read, a source and its split; None where a share of the training rows is held out.

    A source given as `validation` is asked for its split "validation", where it has one, else for "train".
    """
    if isinstance(validation, DataSource):
        return validation, "validation" if "validation" in validation.splits() else "train"
    return (source, "validation") if "validation" in source.splits() else None


def no_rows(name: str, changed: Mapping[str, int]) -> DataError:
    """The error for data ("train", "validation") of which no row is left, with what became of the rows."""
    counts = ", ".join(f"{count} {reason}" for reason, count in changed.items())
    return DataError(
        f"the {'validation ' if name == 'validation' else ''}data has no rows{': ' if counts else ''}{counts}"
    )


def sound(source: DataSource, split: str, name: str, changed: Counter[str]) -> Iterator[Placed]:
    """Yield the sound rows of a split, each with its place.

    Args:
        source: where they come from; its `on_error` says what becomes of bad ones.
        split: one of its splits.
        name: what the run calls that split ("train", "validation").
        changed: counts, by split and reason, the rows that are not used.

    Raises:
        DataError: the first bad row, unless the source skips them.
    """
    for place, row in source.examine(split):
        if not isinstance(row, DataError):
            yield place, row
            continue
        if not isinstance(row, LeftOut) and source.on_error == "stop":
            raise row
        entry = f"{name}: {'left out' if isinstance(row, LeftOut) else 'skipped'}, {reason(row, place)}"
        known = sum(key.startswith(f"{name}: ") for key in changed)
        changed[entry if entry in changed or known < REASONS else f"{name}: skipped, for other reasons"] += 1


def reason(error: DataError, place: str) -> str:
    """Why a row is not used, in words that are the same for all rows with that fault: no place and no numbers."""
    text = str(error).removeprefix(f"{place}: ")
    return re.sub(r"\b\d+\b", "N", text)


def digest(row: Example) -> bytes:
    """16 bytes that stand for the content of a row, or, for a row of a group (`row["group"]`), for the group alone."""
    group = row.get("group")
    content = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str) if group is None else f"group {group}"
    # Tools may hold what no encoding can (half of a surrogate pair): escaped, it is hashed all the same.
    return hashlib.sha256(content.encode(errors="backslashreplace")).digest()[:DIGEST_BYTES]


def rank(row: Example, seed: int) -> float:
    """A number in [0, 1) that says on which side of a split a row falls; equal rows and seeds give equal numbers.

    It depends on the row's digest alone: so rows that are added later move no other row, and the rows of a group are
    never separated.
    """
    return rank_of(digest(row), seed)


def rank_of(content: bytes, seed: int) -> float:
    """The rank of the rows with this digest."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n".encode() + content).digest()[:8], "big") / 2**64


def sides(ranks: Sequence[float], share: float) -> list[bool]:
    """For each row, by its rank, whether it is held out when `share` is; DataError if all rows are the same."""
    if not share:
        return [False] * len(ranks)
    # Tiny data: the share may pick none or all, so the outermost ranks are always on their side.
    lowest, highest = min(ranks, default=0.0), max(ranks, default=0.0)
    if lowest == highest:
        raise DataError("a validation share needs at least two different rows; give more rows, or validation=0")
    return [(number < share and number != highest) or number == lowest for number in ranks]
