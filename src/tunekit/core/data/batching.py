"""Rows to batches: padding by length, the order of an epoch, and which rows make a step."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from tunekit.core.data.codec import IGNORED
from tunekit.core.interfaces import Encoded
from tunekit.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Order = Literal["shuffled", "as-given"]


def supervised_tokens(row: Encoded) -> int:
    """Tokens of `row` that carry loss: labelled ones, but for the first token, which nothing predicts."""
    return sum(label != IGNORED for label in row["labels"][1:])


def on_device(numbers: Sequence[Any], device: str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of `numbers`, lists of lists for more dimensions; nobody waits until it has arrived on a GPU."""
    import torch

    made = torch.tensor(numbers, dtype=dtype)
    return made.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else made.to(device)


def collate(rows: Sequence[Encoded], pad_id: int, device: str = "cpu") -> dict[str, Tensor]:
    """Right-padded tensors `input_ids`, `attention_mask` and `labels`, each of shape (rows, longest).

    The padding is masked by length, never by token id: where the pad token is also the end token, the end is learned.
    """
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> Tensor:
        return on_device([[*row[name], *[fill] * (longest - len(row[name]))] for row in rows], device)

    lengths = on_device([len(row["input_ids"]) for row in rows], device)
    mask = (torch.arange(longest, device=device)[None] < lengths[:, None]).long()
    return {
        "input_ids": padded("input_ids", pad_id),
        "attention_mask": mask,
        "labels": padded("labels", IGNORED),
    }


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Optimizer steps that see every one of `rows` rows once; the last may be smaller."""
    return math.ceil(rows / batch_size)


def rows_of_step(step: int, rows: int, batch_size: int, seed: int, order: Order) -> list[int]:
    """Indices of the rows that optimizer step `step` (from 1) learns from.

    A pure function of its arguments: a resumed run needs no state to go on with the same rows. Each epoch has its own
    order; its last step takes what is left.
    """
    epoch, place = divmod(step - 1, steps_per_epoch(rows, batch_size))
    indices = epoch_order(rows, epoch, seed, order)
    return indices[place * batch_size : (place + 1) * batch_size]


def epoch_order(rows: int, epoch: int, seed: int, order: Order) -> list[int]:
    """The order of one epoch (from 0): shuffled by the seed and the epoch's number, or as given."""
    indices = list(range(rows))
    if order == "shuffled":
        random.Random(f"tunekit order {seed} {epoch}").shuffle(indices)
    return indices


def chunks(lengths: Sequence[int], tokens: int, most: int | None = None, padded: bool = True) -> Iterator[list[int]]:
    """Indices, longest first, in groups of at most `most`, and of at most `tokens` tokens, counted as they are padded.

    Every group has one index at least. Rows of like length go together, so little is padded; neither a step's gradient
    nor a metric depends on the grouping. Without padding every row counts as long as it is.
    """
    group: list[int] = []
    held = 0
    for index in sorted(range(len(lengths)), key=lambda at: lengths[at], reverse=True):
        size = lengths[group[0] if padded and group else index]
        if group and (len(group) == most or held + size > tokens):
            yield group
            group, held = [], 0
            size = lengths[index]
        group.append(index)
        held += size
    if group:
        yield group


def windows(encoded: Encoded, size: int, begin: int | None) -> list[Encoded]:
    """A text's tokens in stretches of at most `size`, each token learned in exactly one of them.

    A stretch begins with the last token of the one before, which is not learned again: the first token of a row is
    predicted by nothing. If the text begins with the token `begin` (BOS), so does each stretch.
    """
    ids, labels = list(encoded["input_ids"]), list(encoded["labels"])
    head = ids[:1] if ids[0] == begin else []
    room = size - len(head) - 1
    if room < 1:
        raise DataError(f"a text cannot be split into windows of {size} tokens; set max_length higher")
    made: list[Encoded] = [{"input_ids": ids[:size], "labels": labels[:size]}]
    for at in range(size, len(ids), room):
        made.append(
            {
                "input_ids": [*head, *ids[at - 1 : at + room]],
                "labels": [IGNORED] * (len(head) + 1) + labels[at : at + room],
            }
        )
    return made


def lengths(rows: Sequence[Encoded]) -> list[int]:
    """Tokens of each row; rows in a store know them without being read."""
    known: list[int] | None = getattr(rows, "lengths", None)
    return [len(row["input_ids"]) for row in rows] if known is None else known


def shortest_and_longest(rows: Sequence[Encoded]) -> list[Encoded]:
    """Two rows that no other is shorter or longer than: what goes well with them does so with all."""
    by_length = sorted(range(len(rows)), key=lengths(rows).__getitem__)
    return [rows[by_length[0]], rows[by_length[-1]]]
