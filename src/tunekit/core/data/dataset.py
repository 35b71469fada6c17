"""From sources to encoded rows: the validation share, the encoding, and an account of every row that is not used."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.data.batching import supervised_tokens
from tunekit.core.data.codec import Codec
from tunekit.core.data.encoded_rows import EncodedRows, Store
from tunekit.core.data.encoding import Windows, encoded
from tunekit.core.data.rows import digest, held_out_in, no_rows, rank_of, sides, sound
from tunekit.core.interfaces import AdapterMethod, DataSource, Example, Trainer
from tunekit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@attrs.frozen(kw_only=True)
class Data:
    """The rows of a run.

    Args:
        train: encoded training rows.
        validation: encoded held-out rows; empty where there are none.
        changed: how many rows were skipped, left out, dropped or cut, by reason ("train: cut to 512 tokens").
    """

    train: EncodedRows
    validation: EncodedRows
    changed: Mapping[str, int]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every token and label in order: a resumed run must have the rows it was started with."""
        return hashlib.sha256(f"{self.train.digest()} {self.validation.digest()}".encode()).hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens in the training rows."""
        return sum(self.train.lengths)

    @property
    def supervised_tokens(self) -> int:
        """Tokens in the training rows that carry loss."""
        return self.train.supervised_tokens()


def load(
    source: DataSource,
    validation: float | DataSource,
    trainer: Trainer,
    codec: Codec,
    longest: int | None,
    seed: int,
    adapter: AdapterMethod | None = None,
) -> Data:
    """Read, split and encode; rows that were encoded before are taken from the cache.

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
    import numpy as np

    changed: Counter[str] = Counter()
    limit, way_out = _limit(trainer, longest, adapter.extra_tokens() if adapter else 0)
    cut = Windows(limit, way_out) if trainer.on_long == "split" and limit is not None else None
    encode = partial(encoded, trainer=trainer, codec=codec, windows=cut, changed=changed)
    fit = partial(_fit, trainer=trainer, limit=limit, way_out=way_out, changed=changed)
    store = encode(source, "train", name="train")
    elsewhere = held_out_in(source, validation)
    if elsewhere is None:
        assert not isinstance(validation, DataSource)
        out = np.array(held(store.digests(), validation, seed), dtype=bool)
        train = fit(store, np.flatnonzero(~out), name="train")
        rest = fit(store, np.flatnonzero(out), name="validation") if out.any() else train[:0]
        return Data(train=train, validation=rest, changed=dict(+changed))
    held_out = encode(*elsewhere, name="validation")
    return Data(
        train=fit(store, np.arange(store.rows), name="train"),
        validation=fit(held_out, np.arange(held_out.rows), name="validation"),
        changed=dict(+changed),
    )


def rows(source: DataSource, validation: float | DataSource, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out rows, not encoded; see `load` for the arguments. DataError if there are none."""
    train = _read(source, "train", "train")
    elsewhere = held_out_in(source, validation)
    if elsewhere is None:
        assert not isinstance(validation, DataSource)
        return hold_out(train, validation, seed)
    return train, _read(*elsewhere, "validation")


def examples(
    encoded_rows: EncodedRows, source: DataSource, validation: float | DataSource, name: str
) -> Iterator[Example]:
    """Yield what encoded rows were before they were encoded, in their order; their source is read again.

    Args:
        encoded_rows: rows that `load` gave.
        source: as it was given there.
        validation: as it was given there.
        name: which of its rows they are, "train" or "validation".

    Raises:
        DataError: texts among them were split into windows.
    """
    elsewhere = held_out_in(source, validation) if name == "validation" else None
    wanted, count = set(encoded_rows.numbers), 0
    for _, row in sound(*(elsewhere or (source, "train")), name, Counter()):
        if count in wanted:
            yield row
        count += 1
    if count != encoded_rows.stored:
        raise DataError(f"the rows of {name} are texts that were split into windows, which are no questions")


def _read(source: DataSource, split: str, name: str) -> list[Example]:
    changed: Counter[str] = Counter()
    found = [row for _, row in sound(source, split, name, changed)]
    if not found:
        raise no_rows(name, changed)
    return found


def hold_out(rows: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split rows into training and held-out ones by their content; see `held`."""
    pairs = list(zip(rows, held([digest(row) for row in rows], share, seed), strict=True))
    return [row for row, out in pairs if not out], [row for row, out in pairs if out]


def held(digests: Sequence[bytes], share: float, seed: int) -> list[bool]:
    """Whether each row is held out, by its digest.

    Rows that are added later do not move the others from one side to the other, and equal rows fall on the same side,
    as do the rows of a group. At least one row is on each side; DataError if there are not two different rows.

    Args:
        digests: of each row.
        share: of the rows to hold out; 0 for none.
        seed: another one holds out other rows.
    """
    return sides([rank_of(content, seed) for content in digests], share)


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


def _limit(trainer: Trainer, longest: int | None, taken: int) -> tuple[int | None, str]:
    """The longest row in tokens, and what a user can do about longer ones."""
    room = room_for_rows(longest, taken)
    limit = min((bound for bound in (trainer.max_length, room) if bound is not None), default=None)
    if taken and limit == room:
        return limit, f"The model's context is {longest}, of which virtual_tokens={taken} are taken: lower them, or set"
    return limit, "Set max_length={longest} (within the model's context), or"


def _fit(
    store: Store,
    rows: NDArray[Any],
    *,
    name: str,
    trainer: Trainer,
    limit: int | None,
    way_out: str,
    changed: Counter[str],
) -> EncodedRows:
    """Those of `rows`, numbers of rows in the store, that can be used within `limit` tokens, cut where need be."""
    import numpy as np

    lengths = store.lengths[rows]
    spans = np.stack([rows, np.zeros_like(rows), lengths], axis=1)
    over = np.zeros(len(rows), dtype=bool) if limit is None else lengths > limit
    if not over.any():
        return EncodedRows(store, spans)
    if trainer.on_long == "error":
        raise DataError(
            f"{over.sum()} rows of {name} are longer than {limit} tokens; the longest has {lengths.max()}. "
            f"{way_out.format(longest=lengths.max())} on_long='truncate' or 'drop' (plain texts: 'split')"
        )
    if trainer.on_long == "drop":
        changed[f"{name}: dropped, longer than {limit} tokens"] += int(over.sum())
        keep = ~over
    else:
        spans[over, 2] = limit
        cut = EncodedRows(store, spans)
        empty = np.array([bool(long) and not supervised_tokens(cut[at]) for at, long in enumerate(over)])
        changed[f"{name}: dropped, nothing to learn from in the first {limit} tokens"] += int(empty.sum())
        changed[f"{name}: cut to {limit} tokens"] += int((over & ~empty).sum())
        keep = ~empty
    if not keep.any():
        raise DataError(f"no row of {name} is left to use: {dict(+changed)}")
    return EncodedRows(store, spans[keep])
