"""InMemory: rows that are already in Python."""

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from tunekit.core.fields import as_tuple
from tunekit.core.interfaces import DataSource, Example
from tunekit.core.schemas import SchemaName, recognise, rename, to_example
from tunekit.errors import ConfigError, DataError


@attrs.frozen(kw_only=True)
class InMemory(DataSource):
    """Rows given as a list of dicts. A saved recipe holds them whole.

    Args:
        rows: the rows, all of one schema.
        schema: "messages", "prompt-completion", "instruction", "question-answer" or "text"; None recognises it.
        columns: for each of the schema's columns that is named otherwise in the rows, that other name.
    """

    name = "in-memory"

    rows: tuple[Mapping[str, Any], ...] = attrs.field(converter=as_tuple, repr=lambda rows: f"<{len(rows)} rows>")
    schema: SchemaName | None = None
    columns: Mapping[str, str] | None = None

    def load(self, split: str) -> Iterable[Example]:
        """Yield the rows, checked; DataError names a bad one as `row N`."""
        if split not in self.splits():
            raise ConfigError(f"there is no split {split!r}; there is only 'train'", "InMemory.split")
        if not self.rows:
            raise DataError("InMemory: there are no rows")
        schema = self.schema or recognise(rename(self.rows[0], self.columns, "row 1"), "row 1")
        for number, row in enumerate(self.rows, start=1):
            yield to_example(row, schema, f"row {number}", self.columns)
