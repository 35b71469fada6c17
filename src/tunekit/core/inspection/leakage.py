"""Rows that are held out and trained on all the same: exactly, or but for case, blanks and punctuation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress

from tunekit.core.inspection.findings import Finding
from tunekit.core.inspection.row_hashes import RowHashes, shared

KINDS = (
    ("exact", "trained on as well: the same row as", "held out, and trained on as well"),
    ("alike", "trained on as well: but for case, blanks and punctuation the row", "held out, and nearly trained on"),
    ("prompts", "its prompt is trained on as well, with another answer, at", "held out, its prompt trained on"),
    ("prompts_alike", "nearly its prompt is trained on as well, at", "held out, nearly its prompt trained on"),
)
"""What is compared, what is said of a row, and what of all such rows; the worst first, and a row is named once."""


def leaks(train: RowHashes, trained: Sequence[bool], held: RowHashes, held_out: Sequence[bool]) -> Iterator[Finding]:
    """A warning for every held-out row that, or whose prompt, is trained on.

    Args:
        train: hashes of the rows among which the training rows are.
        trained: for each of them, whether it is trained on.
        held: hashes of the rows among which the held-out ones are; may be `train` itself.
        held_out: for each of them, whether it is held out.
    """
    named: set[int] = set()
    for column, reason, group in KINDS:
        ours = compress(enumerate(getattr(held, column)), held_out)
        theirs = compress(enumerate(getattr(train, column)), trained)
        for at, first in shared(((at, value) for at, value in ours if at not in named), theirs).items():
            named.add(at)
            yield Finding(held.places[at], f"{reason} {train.places[first]}", group=group, split="validation")
