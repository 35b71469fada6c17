"""Short excerpts of rows, on which a model shows what it makes of rows: trying them takes a moment before training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tunekit.core.data.codec import IGNORED
from tunekit.core.interfaces import Encoded
from tunekit.core.training.prefixes import LEAST

TOKENS = 32
"""Of a row that is tried, unless more can make a difference: a forward pass of two such excerpts is mostly weights."""
ABOUT_LENGTHS = ("window", "chunk", "block", "position", "seq_len", "seq_length", "n_ctx")
"""Parts of names by which configurations call numbers of tokens from which on a model computes otherwise."""


def excerpts(rows: Sequence[Encoded], config: Any) -> Sequence[Encoded]:
    """Of each row the tokens around the place where its loss begins; `rows` where a model may need all of them.

    That is one whose configuration, `config`, names a number of tokens (a window of attention, positions it was first
    trained on) which the longest row goes beyond and an excerpt hardly does.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    telling = [number for number in _about_lengths(config.to_dict()) if TOKENS // 2 < number < longest]
    return rows if telling or longest <= TOKENS else [excerpt(row) for row in rows]


def excerpt(row: Encoded) -> Encoded:
    """The tokens of `row` around the place where its loss begins."""
    learned = (at for at, label in enumerate(row["labels"]) if at and label != IGNORED)
    start = max(0, min(next(learned, 0) - TOKENS // 2, len(row["input_ids"]) - TOKENS))
    return {name: row[name][start : start + TOKENS] for name in ("input_ids", "labels")}


def beginning_alike(rows: Sequence[Encoded]) -> list[Encoded]:
    """The same of two rows that begin alike, which still do: the last of these tokens, and the first of each alone."""
    one, other = (list(row["input_ids"]) for row in rows)
    alike = next(
        (at for at, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), min(len(one), len(other))
    )
    part = slice(max(0, alike - LEAST), alike + TOKENS)
    return [{"input_ids": ids[part], "labels": ids[part]} for ids in (one, other)]


def _about_lengths(fields: Mapping[str, Any]) -> Iterator[int]:
    """The numbers under such names, at any depth; those of layers are none of tokens."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _about_lengths(value)
        elif any(part in str(name) for part in ABOUT_LENGTHS) and "layer" not in name:
            yield from (one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, int))
