"""Checks of data sources: the same rows on every call, in a form that everything downstream knows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice

from tunekit.core.data.conversations import check_messages
from tunekit.core.interfaces import DataSource, Example
from tunekit.errors import ConfigError, DataError
from tunekit.testing.checks.component import unchanged
from tunekit.testing.harness import Harness

MOST = 200
"""So many rows of each split are looked at: a source may be endless, and a check may not."""


def names_its_splits(source: DataSource, harness: Harness) -> None:
    """`splits` is a tuple of names, "train" among them."""
    splits = source.splits()
    assert isinstance(splits, tuple), f"splits() returned {splits!r}: return a tuple of names"
    assert "train" in splits, f'splits() returned {splits!r}: "train" must be one of them'


def refuses_unknown_splits(source: DataSource, harness: Harness) -> None:
    """A split that it does not have is a ConfigError."""
    try:
        list(islice(source.load("no-such-split"), 1))
    except ConfigError:
        return
    raise AssertionError("load('no-such-split') gave rows: raise ConfigError for a split that is not in splits()")


def repeats_itself(source: DataSource, harness: Harness) -> None:
    """Each split has rows, and the same in the same order on every call."""
    for split in source.splits():
        rows = _rows(source, split)
        assert rows, f"load({split!r}) gave no rows: raise DataError if there are none, and do not list the split"
        assert _rows(source, split) == rows, (
            f"load({split!r}) gave other rows the second time: begin anew on every call, in a fixed order (the trainer "
            "shuffles)"
        )


def yields_examples(source: DataSource, harness: Harness) -> None:
    """Every row is a conversation, a text, or a preference between two answers."""
    for split in source.splits():
        for number, row in enumerate(_rows(source, split), start=1):
            where = f"row {number} of {split}"
            assert isinstance(row, Mapping), f"{where} is a {type(row).__name__}: yield dicts"
            if "messages" in row:
                try:
                    check_messages(row["messages"], where)
                except DataError as error:
                    raise AssertionError(f"{error}: yield what `tunekit.to_example` makes of a row") from None
            elif "text" in row:
                assert isinstance(row["text"], str), f"{where}: `text` is a {type(row['text']).__name__}: yield a str"
                assert row["text"].strip(), f"{where}: `text` is empty: raise DataError for it, or pass it over"
            else:
                assert {"prompt", "chosen", "rejected"} <= row.keys(), (
                    f"{where} has {sorted(row)}: yield {{'messages': [...]}}, {{'text': ...}} or "
                    "{'prompt', 'chosen', 'rejected'}; `tunekit.to_example` makes them of other columns"
                )


def yields_plain_values(source: DataSource, harness: Harness) -> None:
    """Every row is JSON: text, numbers, lists and dicts, no tokens and no tensors."""
    for split in source.splits():
        for number, row in enumerate(_rows(source, split), start=1):
            try:
                json.dumps(row, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise AssertionError(f"row {number} of {split} is not JSON ({error}): yield plain values") from None


def examines_what_it_loads(source: DataSource, harness: Harness) -> None:
    """`examine` gives the rows of `load`, each with a place of its own, and bad rows as the DataError they give."""
    for split in source.splits():
        loaded = _rows(source, split)
        examined = list(islice(source.examine(split), MOST))
        places = []
        for item in examined:
            assert isinstance(item, tuple), f"examine({split!r}) gave a {type(item).__name__}: yield (place, row)"
            place, row = item
            assert isinstance(place, str), f"examine({split!r}) gave {item!r}: yield (place, row), the place a text"
            assert place, f"examine({split!r}) gave an empty place for {row!r}: yield `file:line` or `row N`"
            assert isinstance(row, Mapping | DataError), (
                f"examine({split!r}) gave a {type(row).__name__} at {place}: yield a row, or the DataError it gives"
            )
            places += [] if isinstance(row, DataError) else [(place, row)]
        sound = [row for _, row in places]
        assert sound == loaded[: len(sound)], (
            f"examine({split!r}) and load({split!r}) give different rows: let one of them call the other"
        )
        assert sound or not loaded, f"examine({split!r}) gave no sound row, and load({split!r}) {len(loaded)}"
        assert source.on_error in ("stop", "skip"), f"on_error is {source.on_error!r}: make it 'stop' or 'skip'"


def is_stateless(source: DataSource, harness: Harness) -> None:
    """Loading leaves it as it was."""
    with unchanged(source):
        for split in source.splits():
            _rows(source, split)


def _rows(source: DataSource, split: str) -> list[Example]:
    return list(islice(source.load(split), MOST))


CHECKS = (
    names_its_splits,
    refuses_unknown_splits,
    repeats_itself,
    yields_examples,
    yields_plain_values,
    examines_what_it_loads,
    is_stateless,
)
