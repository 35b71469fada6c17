"""InMemory: rows that are already in Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from tunekit.core.component import Context
from tunekit.core.data.row_source import RowSource
from tunekit.errors import ConfigError

MOST = 100_000
"""So many rows a run takes: its recipe holds them all."""


def _as_rows(value: Any) -> Any:
    """A list, a pandas DataFrame or a `datasets.Dataset` as a tuple of rows, without importing either package."""
    package = type(value).__module__.partition(".")[0]
    if package == "pandas" and hasattr(value, "to_dict"):
        # What pandas calls missing (NaN, NaT, NA) is no value in a row.
        columns, present = value.columns, value.notna().to_numpy()
        records = zip(*(value[column].tolist() for column in columns), strict=True)
        return tuple(
            {str(name): cell for name, cell, there in zip(columns, record, marks, strict=True) if there}
            for record, marks in zip(records, present, strict=True)
        )
    if package == "datasets" and hasattr(value, "features"):
        from tunekit.plugins.sources.arrow import plain_rows

        return tuple(plain_rows(value))
    return tuple(value) if isinstance(value, list) else value


@attrs.frozen(kw_only=True)
class InMemory(RowSource):
    """Rows given as a list of dicts, a pandas DataFrame or a `datasets.Dataset`. A saved recipe holds them whole.

    Args:
        rows: the rows, all of one schema.
    """

    name = "in-memory"

    rows: tuple[Mapping[str, Any], ...] = attrs.field(converter=_as_rows, repr=lambda rows: f"<{len(rows)} rows>")

    def check(self, context: Context) -> None:
        """The rows must be few enough to be written into a recipe."""
        if len(self.rows) > MOST:
            raise ConfigError(
                f"{len(self.rows):,} rows, and the recipe of a run holds them all; write them to a file, and read it "
                "with JsonLines or Table",
                "InMemory.rows",
            )

    def read(self, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Each row and its place as `row N`."""
        for number, row in enumerate(self.rows, start=1):
            yield f"row {number}", row
