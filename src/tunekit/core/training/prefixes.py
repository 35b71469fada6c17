"""Which rows of a forward pass begin alike, and how they are laid end to end with that beginning once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import attrs

from tunekit.core.interfaces import Encoded

LEAST = 32
"""Tokens that a shared prefix has at least.

From there on it pays. In every layer, each row after the first is spared the prefix's tokens, and costs a copy of the
prefix's keys and values and a mask: so it is a matter of lengths, and not of how many layers there are.
"""

Tokens = list[int]


@attrs.frozen(kw_only=True)
class Group:
    """Rows that begin alike.

    Args:
        rows: their numbers.
        prefix: tokens that they share and that are computed once; 0 for a row on its own.
    """

    rows: Sequence[int]
    prefix: int = 0

    @property
    def saved(self) -> int:
        """Tokens that need not be computed."""
        return self.prefix * (len(self.rows) - 1)


@attrs.frozen(kw_only=True)
class Layout:
    """Rows laid end to end, in segments: a row is one, or it is the segment of its prefix and one with its remainder.

    Args:
        tokens: of the whole sequence.
        positions: of each token within its row.
        lengths: tokens of each segment.
        after: for a segment that is a remainder, by its number, the number of the segment that is its prefix.
        begins: for each row, how many of its tokens are in its prefix, where this begins, and where the remainder does.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    lengths: Sequence[int]
    after: Mapping[int, int]
    begins: Sequence[tuple[int, int, int]]

    @classmethod
    def of(cls, rows: Sequence[Encoded], shared: bool = False) -> Layout:
        """That of `rows`; with what they share once where `shared` and it pays."""
        inputs = [list(row["input_ids"]) for row in rows]
        groups = group(inputs) if shared else [Group(rows=[number]) for number in range(len(inputs))]
        pieces: list[range] = []  # the positions of each segment
        tokens: list[int] = []
        after: dict[int, int] = {}
        placed: dict[int, tuple[int, int, int]] = {}
        for each in groups:
            begin, prefix = len(tokens), len(pieces)
            if each.prefix:
                tokens += inputs[each.rows[0]][: each.prefix]
                pieces.append(range(each.prefix))
            for row in each.rows:
                placed[row] = (each.prefix, begin, len(tokens))
                if each.prefix == len(inputs[row]):
                    continue
                if each.prefix:
                    after[len(pieces)] = prefix
                tokens += inputs[row][each.prefix :]
                pieces.append(range(each.prefix, len(inputs[row])))
        return cls(
            tokens=tokens,
            positions=[position for piece in pieces for position in piece],
            lengths=[len(piece) for piece in pieces],
            after=after,
            begins=[placed[row] for row in range(len(inputs))],
        )

    def filled(self, multiple: int) -> Layout:
        """With a segment at the end that nothing else sees, so that the tokens are a multiple of so many."""
        more = range(-len(self.tokens) % multiple)
        if not more:
            return self
        return attrs.evolve(
            self,
            tokens=[*self.tokens, *(self.tokens[0] for _ in more)],
            positions=[*self.positions, *more],
            lengths=[*self.lengths, len(more)],
        )

    def place(self, row: int, at: int) -> int:
        """Where the token that row number `row` has at `at` is in the sequence: that of a prefix is of many rows."""
        prefix, begin, rest = self.begins[row]
        return begin + at if at < prefix else rest + at - prefix


def group(rows: Sequence[Tokens]) -> list[Group]:
    """All of `rows` in groups that share a prefix, which save no less than any one; a row that shares none is its own.

    A row may be no longer than its prefix. Groups are in the order of their first rows, rows in their own.
    """
    by_tokens = sorted(range(len(rows)), key=rows.__getitem__)
    alike = [_common(rows[one], rows[other]) for one, other in pairwise(by_tokens)]
    found = _best(by_tokens, alike)
    return sorted((attrs.evolve(each, rows=sorted(each.rows)) for each in found), key=lambda each: each.rows[0])


def sharing(rows: Sequence[Encoded]) -> list[Encoded]:
    """The two shortest rows of the group that saves most: to try on a model; empty where no group pays."""
    inputs = [list(row["input_ids"]) for row in rows]
    best = max(group(inputs), key=lambda each: each.saved)
    if not best.prefix:
        return []
    return [rows[row] for row in sorted(best.rows, key=lambda row: len(inputs[row]))[:2]]


def _best(rows: Sequence[int], alike: Sequence[int]) -> list[Group]:
    """The groups of sorted `rows`; `alike` are the tokens that each shares with the next.

    They part where neighbours are least alike, and each part is a question of its own. What saves less there than by
    what all share, comes together again.
    """
    if len(rows) == 1:
        return [Group(rows=rows)]
    least = min(alike)
    parts = [found for part in _parted(alike, least) for found in _best(rows[part], alike[part.start : part.stop - 1])]
    together = [part for part in parts if part.saved < least * len(part.rows)]
    pool = [row for part in together for row in part.rows]
    if len(pool) < 2 or least < LEAST:
        return parts
    pooled = [Group(rows=pool, prefix=least), *(part for part in parts if part not in together)]
    return max(parts, pooled, key=lambda groups: sum(each.saved for each in groups))


def _parted(alike: Sequence[int], least: int) -> Iterator[slice]:
    """The stretches of rows between neighbours that are no more than `least` alike."""
    begins = [0, *(at + 1 for at, tokens in enumerate(alike) if tokens == least), len(alike) + 1]
    for begin, end in pairwise(begins):
        yield slice(begin, end)


def _common(one: Tokens, other: Tokens) -> int:
    """Tokens at the beginning that are the same."""
    if one[: len(other)] == other[: len(one)]:
        return min(len(one), len(other))
    return next(at for at, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
