"""Rows of Arrow tables as plain Python values; shared by the sources that read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

BATCH = 1000
"""Rows that are turned into Python objects at a time."""


def rows_of(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a record batch or a table.

    Arrow gives every object of a column the keys of all of them, and nulls where a row had none: within a column, these
    keys are taken away again. A column that is null stays.
    """
    for row in batch.to_pylist():
        yield {name: without_nulls(value) for name, value in row.items()}


def without_nulls(value: Any) -> Any:
    """A value without the keys that are null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def plain_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of a `datasets.Dataset`, a batch at a time; class labels by their names."""
    names = {name: feature.names for name, feature in dataset.features.items() if hasattr(feature, "names")}
    batches: Iterable[Any] = dataset.with_format("arrow").iter(batch_size=BATCH)
    for batch in batches:
        for row in rows_of(batch):
            for name, labels in names.items():
                label = row[name]
                # -1 is how `datasets` writes "not labelled".
                row[name] = labels[label] if isinstance(label, int) and 0 <= label < len(labels) else None
            yield row
