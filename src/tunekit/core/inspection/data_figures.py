"""Counting rows: kinds, roles, turns, lengths, answers, duplicates. Some bytes are kept of each row, never the row."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import attrs

from tunekit.core.inspection.findings import Finding, file_of
from tunekit.core.inspection.row_hashes import Parts, RowHashes, repeats

MOST_LABELS = 100
"""Data with more different answers than this is no classification."""
ROWS_A_LABEL = 5
"""Nor is data with fewer rows than this for each different answer."""
LONGEST_LABEL = 100
"""Nor is data with an answer of more characters."""
UNBALANCED = 0.8
"""From this share of one answer on, answering it always looks like success."""


@attrs.frozen(kw_only=True)
class Distribution:
    """Figures of many numbers; percentiles between two numbers are interpolated linearly, as numpy does."""

    minimum: float
    mean: float
    p50: float
    p95: float
    maximum: float
    total: float

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Distribution | None:
        """Of numbers in any order; None if there are none."""
        if not numbers:
            return None
        ordered = array("q", sorted(numbers))

        def percentile(share: float) -> float:
            at, part = divmod(share * (len(ordered) - 1), 1)
            low, high = ordered[int(at)], ordered[min(int(at) + 1, len(ordered) - 1)]
            return low + part * (high - low)

        return cls(
            minimum=ordered[0],
            mean=sum(ordered) / len(ordered),
            p50=percentile(0.5),
            p95=percentile(0.95),
            maximum=ordered[-1],
            total=sum(ordered),
        )


@attrs.frozen(kw_only=True)
class Figures:
    """The sound rows of a source, counted.

    Args:
        rows: rows read, bad ones included.
        sound: those that can be read and encoded, over-length ones included; what follows counts them alone.
        left_out: rows that the source was told to leave out, by reason.
        schemas: rows by form: "messages", "messages with tools", "text", "preference".
        roles: messages by role.
        turns: messages in a row.
        without_system: rows of messages without a system message.
        lengths: of rows, in tokens, or in characters where no model was given.
        supervised: tokens of rows that carry loss; None where no model was given.
        duplicates: rows that are the same as an earlier one.
        near_duplicates: rows that differ from an earlier one only in case, blanks and punctuation.
        repeated_prompts: rows whose prompt an earlier, different row has as well.
        labels: answers of classification-like data, the most frequent first; None for other data.
    """

    rows: int
    sound: int
    left_out: Mapping[str, int]
    schemas: Mapping[str, int]
    roles: Mapping[str, int]
    turns: Distribution | None
    without_system: int
    lengths: Distribution | None
    supervised: Distribution | None
    duplicates: int
    near_duplicates: int
    repeated_prompts: int
    labels: Mapping[str, int] | None

    @property
    def majority(self) -> float:
        """The share of the most frequent answer; 0 where there are no labels."""
        return max(self.labels.values()) / self.sound if self.labels else 0.0


class Tally:
    """Counts the rows of one split as they come.

    Args:
        split: "train" or "validation".

    Of each sound row it holds, beside hashes: `lengths` and `supervised`, in tokens; `taken` and `learned`, the same of
    what a run takes of it; `pieces`, how many rows that makes in the run, 0 where it drops it, more than one where it
    splits it; and its rank, by which a share is held out.
    """

    def __init__(self, split: str) -> None:
        self.split = split
        self.rows = 0
        self.left_out: Counter[str] = Counter()
        self.prints = RowHashes()
        self.lengths, self.supervised, self.taken, self.learned, self.pieces = (array("l") for _ in range(5))
        self.ranks = array("d")
        self.checksum = 0
        self.first_place = ""
        self._shapes: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._labels: Counter[str] | None = Counter()
        self._without_system = ""

    def add(self, places: Sequence[str], rows: Sequence[Parts]) -> None:
        """Count sound rows but for their lengths."""
        self._shapes.update([(row.form, row.roles) for row in rows])
        for row in rows:
            if self._labels is None:
                break
            self._count_label(row)
        if not self._without_system:
            bare = (place for place, row in zip(places, rows, strict=True) if _lacks_system(row.form, row.roles))
            self._without_system = next(bare, "")
        self.prints.add(places, rows)

    def add_lengths(self, length: int, supervised: int, taken: int, learned: int, pieces: int) -> None:
        """Count the lengths of a sound row, as it is and as a run takes it."""
        self.lengths.append(length)
        self.supervised.append(supervised)
        self.taken.append(taken)
        self.learned.append(learned)
        self.pieces.append(pieces)

    def _count_label(self, parts: Parts) -> None:
        assert self._labels is not None
        answer = parts.answer.strip()
        if parts.form.startswith("messages") and answer and len(answer) <= LONGEST_LABEL:
            self._labels[answer] += 1
            if len(self._labels) <= MOST_LABELS:
                return
        self._labels = None

    def close(self, *, encoded: bool) -> tuple[Figures, list[Finding]]:
        """The sums, and what is odd about the rows taken together; `encoded` says whether lengths are in tokens."""
        exact = dict(repeats(self.prints.exact))
        near = {at: first for at, first in repeats(self.prints.alike) if at not in exact}
        schemas: Counter[str] = Counter()
        roles: Counter[str] = Counter()
        turns = array("q")
        without_system = 0
        for (form, row_roles), count in self._shapes.items():
            schemas[form] += count
            for role in row_roles:
                roles[role] += count
            if row_roles:
                turns.extend([len(row_roles)] * count)
            if _lacks_system(form, row_roles):
                without_system += count
        figures = Figures(
            rows=self.rows,
            sound=len(self.prints),
            left_out=dict(self.left_out),
            schemas=dict(schemas.most_common()),
            roles=dict(roles.most_common()),
            turns=Distribution.of(turns),
            without_system=without_system,
            lengths=Distribution.of(self.lengths),
            supervised=Distribution.of(self.supervised) if encoded else None,
            duplicates=len(exact),
            near_duplicates=len(near),
            repeated_prompts=sum(at not in exact for at, _ in repeats(self.prints.prompts)),
            labels=self._balance(),
        )
        return figures, [*self._repeated(exact, near), *self._odd(figures)]

    def _balance(self) -> dict[str, int] | None:
        labels = self._labels
        if not labels or labels.total() < ROWS_A_LABEL * len(labels):
            return None
        return dict(labels.most_common())

    def _repeated(self, exact: Mapping[int, int], near: Mapping[int, int]) -> Iterator[Finding]:
        places = self.prints.places
        for repeated, how, group in (
            (exact, "the same row as", "the same row as an earlier one"),
            (near, "but for case, blanks and punctuation the same row as", "nearly the same row as an earlier one"),
        ):
            for at, first in repeated.items():
                yield Finding(places[at], f"{how} {places[first]}", group=group, split=self.split)

    def _odd(self, figures: Figures) -> Iterator[Finding]:
        conversations = sum(count for form, count in figures.schemas.items() if form.startswith("messages"))
        without = figures.without_system
        if 0 < without < conversations:
            reason = (
                f"no system message in {without:,} of {conversations:,} rows, this one the first; the others have one"
            )
            yield Finding(self._without_system, reason, group=reason, split=self.split)
        if figures.labels and len(figures.labels) == 1 and figures.sound >= 2 * ROWS_A_LABEL:
            yield self.of_all("every row has the same answer, so there is nothing to tell apart")
        elif figures.majority >= UNBALANCED and len(figures.labels or ()) > 1:
            label = next(iter(figures.labels or {}))
            yield self.of_all(f"{figures.majority:.0%} of the answers are {label!r}, so always saying that looks good")

    def of_all(self, reason: str, severity: Literal["error", "warning"] = "warning") -> Finding:
        """A finding about all rows, placed in the file of the first."""
        place = file_of(self.first_place)
        return Finding(place, reason, severity=severity, group=reason, split=self.split)


def _lacks_system(form: str, roles: Sequence[str]) -> bool:
    return form.startswith("messages") and roles[0] != "system"


def compact(counts: Mapping[str, int], most: int = 6) -> str:
    """Counts on one line: "user 120, assistant 118"."""
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:most]]
    return ", ".join([*shown, *([f"{len(counts) - most} more"] if len(counts) > most else [])])
