"""Rows to batches: padding by length, the order of an epoch, and which rows make a step."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs

from tunekit.core.data.codec import IGNORED
from tunekit.core.interfaces import Encoded
from tunekit.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Order = Literal["shuffled", "by-length", "as-given"]


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


@attrs.define(kw_only=True)
class RowOrder:
    """Which rows each optimizer step learns from.

    A pure function of its fields: a resumed run needs no state to go on with the same rows. Each epoch has its own
    order; its last step takes what is left.

    Args:
        lengths: tokens of each training row.
        batch_size: rows of a step.
        seed: of the run.
        order: rows "shuffled", "as-given", or "by-length": rows of like length share a step, every row is seen once an
            epoch all the same, and the steps come in shuffled order.
    """

    lengths: Sequence[int]
    batch_size: int
    seed: int
    order: Order
    _made: tuple[int, list[int]] = attrs.field(default=(-1, []), init=False)

    def epoch(self, epoch: int) -> list[int]:
        """Indices of all rows in the order of an epoch (from 0)."""
        if self._made[0] != epoch:  # kept: a step needs a few rows, and the order of an epoch is that of all
            self._made = (epoch, self._make(epoch))
        return self._made[1]

    def of_step(self, step: int) -> list[int]:
        """Indices of the rows of optimizer step `step` (from 1)."""
        epoch, place = divmod(step - 1, steps_per_epoch(len(self.lengths), self.batch_size))
        return self.epoch(epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def _make(self, epoch: int) -> list[int]:
        indices = list(range(len(self.lengths)))
        if self.order == "as-given":
            return indices
        drawn = random.Random(f"tunekit order {self.seed} {epoch}")
        drawn.shuffle(indices)
        if self.order == "shuffled":
            return indices
        # What makes no whole step is drawn from all lengths: the end of the sorted rows would be the longest each time.
        whole = len(indices) // self.batch_size * self.batch_size
        alike = sorted(indices[:whole], key=lambda at: self.lengths[at])
        steps = [alike[at : at + self.batch_size] for at in range(0, whole, self.batch_size)]
        drawn.shuffle(steps)
        return [*(at for step in steps for at in step), *indices[whole:]]


def chunks(lengths: Sequence[int], tokens: int, most: int | None = None, padded: bool = True) -> Iterator[list[int]]:
    """Indices, longest first, in groups of at most `most`, and of at most `tokens` tokens, counted as they are padded.

    Every group has one index at least. Rows of like length go together, so little is padded; neither a step's gradient
    nor a metric depends on the grouping. Without padding every row counts as long as it is, and goes where the least
    room is left that it fits into (best-fit decreasing; Johnson, 1973): few groups, and full ones.
    """
    longest_first = sorted(range(len(lengths)), key=lambda at: lengths[at], reverse=True)
    if not padded:
        yield from _best_fit(longest_first, lengths, tokens, most)
        return
    group: list[int] = []
    for index in longest_first:
        if group and (len(group) == most or (len(group) + 1) * lengths[group[0]] > tokens):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _best_fit(longest_first: list[int], lengths: Sequence[int], tokens: int, most: int | None) -> list[list[int]]:
    """Each index in the group with the least room that it fits into, or in a new one."""
    groups: list[list[int]] = []
    room: list[int] = []
    for index in longest_first:
        fits = [at for at, left in enumerate(room) if lengths[index] <= left and len(groups[at]) != most]
        if not fits:
            fits = [len(groups)]
            groups.append([])
            room.append(tokens)
        best = min(fits, key=room.__getitem__)
        groups[best].append(index)
        room[best] -= lengths[index]
    return groups


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
