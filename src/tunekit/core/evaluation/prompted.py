"""Prompted: the base model asked with examples, or told what to do: what training has to beat."""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from tunekit.core.data.codec import IGNORED, Codec, Message
from tunekit.core.data.dataset import Data, examples
from tunekit.core.evaluation.answers import split
from tunekit.core.fields import at_least, check_types
from tunekit.core.interfaces import DataSource, Encoded, Evaluator, Example
from tunekit.errors import ConfigError, DataError


@attrs.frozen(kw_only=True)
class Prompted:
    """A baseline: the base model answers the held-out rows with training rows before each, as talk that went before.

    In-context learning (Brown et al., https://arxiv.org/abs/2005.14165): every evaluator that reads the held-out rows
    measures the base on these longer rows, before training. The shots are chosen among the training rows by the seed,
    the same for every held-out row, and none says what a held-out row says. The tokens that are measured are those of
    the base and of the tuned model, so the figures can be compared row by row. Where a row would not fit into the
    model's context, it gets fewer shots; the details say how many rows got how many.

    Args:
        shots: training rows in the prompt; 0 leaves the instruction alone.
        instruction: what the model is told first, as the system message, before what a row has as its own.
    """

    shots: int = attrs.field(default=4, validator=at_least(0))
    instruction: str | None = None

    def __attrs_post_init__(self) -> None:
        check_types(self)
        if not self.shots and not self.instruction:
            raise ConfigError("no shots and no instruction: that is the base itself", "Prompted.shots")


@attrs.frozen(kw_only=True)
class Baseline:
    """Held-out rows with a longer prompt.

    Args:
        name: "prompted-4", of a second one with as many shots "prompted-4-2".
        rows: in the order of the held-out rows, supervised on the same tokens.
        details: the rows that stand in the prompt (`shots`), and how many held-out rows have how many (`rows`).
    """

    name: str
    rows: Sequence[Encoded]
    details: Mapping[str, Any]


def baselines(
    asked: Sequence[Prompted],
    source: DataSource,
    validation: float | DataSource,
    data: Data,
    codec: Codec,
    evaluators: Iterable[Evaluator],
    room: int | None,
    seed: int,
) -> list[Baseline]:
    """The rows of each baseline; none without held-out rows. The sources are read again.

    Args:
        asked: the baselines.
        source: where the training rows came from.
        validation: where the held-out rows came from, or which share of the training rows they are.
        data: the rows of the run.
        codec: tokenizer and template.
        evaluators: what will measure; their `max_new_tokens` must find room behind a prompt.
        room: the model's context in tokens; None where it is unknown.
        seed: chooses the shots.

    Raises:
        DataError: there are too few training rows, rows that ask nothing, or no row with room for a longer prompt.
    """
    if not asked or not data.validation:
        return []
    held_out = list(examples(data.validation, source, validation, "validation"))
    if not all("messages" in row for row in held_out):
        raise DataError("a Prompted baseline needs held-out rows with a prompt and an answer; plain texts have none")
    shots = _shots(
        examples(data.train, source, validation, "train"), held_out, max(one.shots for one in asked), f"shots {seed}"
    )
    able = [evaluator for evaluator in evaluators if evaluator.reads_rows]
    answer = max((getattr(evaluator, "max_new_tokens", 0) for evaluator in able), default=0)
    rows = list(zip(held_out, data.validation, strict=True))
    return [
        _baseline(name, one, shots[: one.shots], rows, codec, room, answer)
        for name, one in zip(names(asked), asked, strict=True)
    ]


def names(asked: Sequence[Prompted]) -> list[str]:
    """What each baseline is called, in files and tables."""
    found: Counter[int] = Counter()
    made = []
    for one in asked:
        found[one.shots] += 1
        made.append(f"prompted-{one.shots}" + (f"-{found[one.shots]}" if found[one.shots] > 1 else ""))
    return made


def _shots(train: Iterable[Example], held_out: Iterable[Example], count: int, seed: str) -> list[Sequence[Message]]:
    """The talks that the seed chooses, whatever the order of the rows; none twice, and none of a held-out row."""
    taken = {_said(row) for row in held_out}
    ranked: dict[bytes, Sequence[Message]] = {}
    for row in train:
        # What was said with tools makes no sense without them.
        if "messages" in row and not row.get("tools") and row["messages"][-1]["role"] == "assistant":
            said = _said(row)
            if said not in taken:
                ranked[hashlib.sha256(seed.encode() + said).digest()] = row["messages"]
                if len(ranked) > 2 * count + 64:
                    ranked = {key: ranked[key] for key in heapq.nsmallest(count, ranked)}
    if len(ranked) < count:
        raise DataError(f"Prompted.shots={count}: only {len(ranked)} training rows are not among the held-out ones")
    return [
        [message for message in ranked[key] if message["role"] != "system"] for key in heapq.nsmallest(count, ranked)
    ]


def _said(row: Example) -> bytes:
    """What stands for a conversation, but for case and white space."""
    said = [(message["role"], " ".join(str(message.get("content")).casefold().split())) for message in row["messages"]]
    return hashlib.sha256(repr(said).encode(errors="backslashreplace")).digest()


def _baseline(
    name: str,
    prompted: Prompted,
    shots: Sequence[Sequence[Message]],
    rows: Sequence[tuple[Example, Encoded]],
    codec: Codec,
    room: int | None,
    answer: int,
) -> Baseline:
    made, counts = [], Counter[str]()
    for example, row in rows:
        longer, count = _longer(prompted, shots, example, row, codec, room, answer)
        made.append({column: array("i", values) for column, values in longer.items()})
        counts["as they are" if count is None else f"{count} shots"] += 1
    if counts["as they are"] == len(rows):
        raise DataError(
            f"{name}: no held-out row has room for an instruction or a shot before it in the model's context of {room} "
            "tokens, or the template says otherwise what follows other talk; leave the baseline out"
        )
    return Baseline(name=name, rows=made, details={"shots": shots, "rows": dict(counts)})


def _longer(
    prompted: Prompted,
    shots: Sequence[Sequence[Message]],
    example: Example,
    row: Encoded,
    codec: Codec,
    room: int | None,
    answer: int,
) -> tuple[Encoded, int | None]:
    """The row with as many shots before it as it has room for, and how many; None where it stays as it is."""
    own, expected = list(row["input_ids"]), len(split(row)[1])
    for count in range(len(shots), -1, -1):
        if not count and not prompted.instruction:
            break
        talk = list(_talk(prompted.instruction, shots[:count], example["messages"]))
        ids = codec.encode({**example, "messages": talk}, "last")["input_ids"]
        if room is None or len(ids) + max(0, answer - expected) <= room:
            same = _common_end(ids, own)
            if same < expected:
                break  # the row was cut, or the template shows an answer otherwise after other talk
            labels = [IGNORED, *row["labels"][1:]]  # nothing predicts the first token of the row itself
            return {"input_ids": ids, "labels": [IGNORED] * (len(ids) - same) + labels[len(own) - same :]}, count
    return row, None


def _talk(
    instruction: str | None, shots: Sequence[Sequence[Message]], messages: Sequence[Message]
) -> Iterator[Message]:
    """System message, shots, and the rest of the row's own messages."""
    own = messages[0]["content"] if messages[0]["role"] == "system" else None
    if said := "\n\n".join(text for text in (instruction, own) if text):
        yield {"role": "system", "content": said}
    for shot in shots:
        yield from shot
    yield from messages[own is not None :]


def _common_end(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two rows end in alike."""
    shorter = min(len(left), len(right))
    return next((at for at in range(shorter) if left[-1 - at] != right[-1 - at]), shorter)
