"""From sources to encoded rows: the validation share, the encoding, and an account of every row that is not used."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence

import attrs

from tunekit.core.batching import supervised_tokens, windows
from tunekit.core.codec import Codec
from tunekit.core.interfaces import AdapterMethod, DataSource, Encoded, Example, Trainer
from tunekit.core.rows import Placed, rank, read, sides
from tunekit.errors import ConfigError, DataError


@attrs.frozen(kw_only=True)
class Data:
    """The rows of a run.

    Args:
        train: encoded training rows.
        validation: encoded held-out rows; empty where there are none.
        changed: how many rows were skipped, left out, dropped or cut, by reason ("train: cut to 512 tokens").
    """

    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    changed: Mapping[str, int]

    @property
    def fingerprint(self) -> str:
        """A hash of every token and label in order: a resumed run must have the rows it was started with."""
        rows = [[list(row["input_ids"]), list(row["labels"])] for row in [*self.train, *self.validation]]
        return hashlib.sha256(json.dumps([len(self.train), rows]).encode()).hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens in the training rows."""
        return sum(len(row["input_ids"]) for row in self.train)

    @property
    def supervised_tokens(self) -> int:
        """Tokens in the training rows that carry loss."""
        return sum(map(supervised_tokens, self.train))


def load(
    source: DataSource,
    validation: float | DataSource,
    trainer: Trainer,
    codec: Codec,
    longest: int | None,
    seed: int,
    adapter: AdapterMethod | None = None,
) -> Data:
    """Read, split and encode.

    Args:
        source: the training rows, and where it has a split "validation", the held-out ones.
        validation: a source of held-out rows, or the share of rows to hold out; 0 for none.
        trainer: says how a row is encoded, how long it may be and what happens to a longer one.
        codec: tokenizer and template.
        longest: the model's context length in tokens; None where it is unknown.
        seed: chooses which rows a share holds out.
        adapter: says how many tokens of the context it takes from every row; None for none.

    Raises:
        ConfigError: the method takes the whole context.
        DataError: no rows, a row that cannot be used, rows that are too long.
    """
    taken = adapter.extra_tokens() if adapter else 0
    room = room_for_rows(longest, taken)
    limit = min((bound for bound in (trainer.max_length, room) if bound is not None), default=None)
    way_out = "Set max_length={longest} (within the model's context), or"
    if taken and limit == room:
        way_out = f"The model's context is {longest}, of which virtual_tokens={taken} are taken: lower them, or set"
    changed: Counter[str] = Counter()
    train, held_out = split(source, validation, seed, changed)
    return Data(
        train=_encode(train, "train", trainer, codec, limit, way_out, changed),
        validation=_encode(held_out, "validation", trainer, codec, limit, way_out, changed) if held_out else [],
        changed=dict(changed),
    )


def room_for_rows(longest: int | None, taken: int) -> int | None:
    """Tokens that a row may have at most: those of the context that the adapter method does not take.

    Raises ConfigError if it takes all of them.
    """
    room = None if longest is None else longest - taken
    if room is not None and room < 2:  # a token to predict, and one to predict it from
        raise ConfigError(
            f"virtual_tokens={taken} leave no room in the model's context of {longest}", "Pipeline.adapter"
        )
    return room


def rows(source: DataSource, validation: float | DataSource, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out rows, not encoded; see `load` for the arguments. DataError if there are none."""
    train, held_out = split(source, validation, seed, Counter())
    return [row for _, row in train], [row for _, row in held_out]


def split(
    source: DataSource, validation: float | DataSource, seed: int, changed: Counter[str]
) -> tuple[list[Placed], list[Placed]]:
    """Training and held-out rows with their places; see `load` for the arguments. DataError if there are none.

    A source given as `validation` is asked for its split "validation", where it has one, else for "train". Rows that
    the sources skip or leave out are counted in `changed`.
    """
    rows = read(source, "train", "train", changed)
    if not rows:
        raise DataError(f"the data has no rows{_counts(changed)}")
    if isinstance(validation, DataSource):
        part = "validation" if "validation" in validation.splits() else "train"
        held_out = read(validation, part, "validation", changed)
        if not held_out:
            raise DataError(f"the validation data has no rows{_counts(changed)}")
        return rows, held_out
    if "validation" in source.splits():
        return rows, read(source, "validation", "validation", changed)
    held = sides([rank(row, seed) for _, row in rows] if validation else [0.0] * len(rows), validation)
    pairs = list(zip(rows, held, strict=True))
    return [row for row, out in pairs if not out], [row for row, out in pairs if out]


def hold_out(rows: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split rows into training and held-out ones by a hash of their content, or of the group they belong to.

    Rows that are added later do not move the others from one side to the other, and equal rows fall on the same side,
    as do the rows of a group. At least one row is on each side; DataError if there are not two different rows.
    """
    pairs = list(zip(rows, sides([rank(row, seed) for row in rows], share), strict=True))
    return [row for row, out in pairs if not out], [row for row, out in pairs if out]


def _counts(changed: Mapping[str, int]) -> str:
    """What became of the rows, to be said where none is left."""
    return ": " + ", ".join(f"{count} {what}" for what, count in changed.items()) if changed else ""


def _encode(
    rows: Sequence[Placed],
    split: str,
    trainer: Trainer,
    codec: Codec,
    limit: int | None,
    way_out: str,
    changed: Counter[str],
) -> list[Encoded]:
    kept: list[Encoded] = []
    too_long: list[int] = []
    examples = codec.ahead([row for _, row in rows])
    for (place, _), row in zip(rows, examples, strict=True):
        try:
            encoded = trainer.encode(row, codec)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        if not supervised_tokens(encoded):
            raise DataError(f"{place}: no token of it carries loss, so nothing can be learned from it")
        length = len(encoded["input_ids"])
        if limit is not None and length > limit:
            too_long.append(length)
            if trainer.on_long == "split":
                if "text" not in row:
                    raise DataError(
                        f"{place}: a conversation of {length} tokens, and only plain texts can be "
                        f"split: an answer makes no sense without its question. {way_out.format(longest=length)} "
                        "on_long='truncate' or 'drop'"
                    )
                kept += windows(encoded, limit, codec.tokenizer.bos_token_id)
                changed[f"{split}: split into windows of {limit} tokens"] += 1
                continue
            encoded = {name: values[:limit] for name, values in encoded.items()}
            if trainer.on_long == "drop":
                changed[f"{split}: dropped, longer than {limit} tokens"] += 1
                continue
            if not supervised_tokens(encoded):
                changed[f"{split}: dropped, nothing to learn from in the first {limit} tokens"] += 1
                continue
            changed[f"{split}: cut to {limit} tokens"] += 1
        kept.append(encoded)
    if too_long and trainer.on_long == "error":
        raise DataError(
            f"{len(too_long)} rows of {split} are longer than {limit} tokens; the longest has {max(too_long)}. "
            f"{way_out.format(longest=max(too_long))} on_long='truncate' or 'drop' (plain texts: 'split')"
        )
    if not kept:
        raise DataError(f"no row of {split} is left to use: {dict(changed)}")
    return kept
