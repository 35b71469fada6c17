"""RowSource: a data source that reads rows of some format; their schema, checks and errors are dealt with here."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import attrs

from tunekit.core.data.conversations import kind_of
from tunekit.core.data.schemas import SchemaName, recognise, rename, to_example
from tunekit.core.fields import as_tuple
from tunekit.core.interfaces import DataSource, Example
from tunekit.errors import ConfigError, DataError, LeftOut


@attrs.frozen(kw_only=True)
class RowSource(DataSource):
    """Base of sources that read rows: write `read`, and rows of every schema are recognised, checked and converted.

    Args:
        schema: the rows' schema ("messages", "conversations", "preference", "prompt-completion", "instruction",
            "instruction-response", "question-answer", "text-label" or "text"); None recognises it in the first row.
        columns: for each of the schema's columns that is named otherwise in the data, that other name.
        labels: names of the labels 0, 1, ... of the schema "text-label"; names in the data need none.
        group: a column whose equal values belong together (a patient, a document): the rows of a group are held out
            together or not at all.
        on_error: "stop" at the first row that cannot be used, or "skip" such rows, counted in plan and result.
    """

    schema: SchemaName | None = None
    columns: Mapping[str, str] | None = None
    labels: tuple[str, ...] = attrs.field(default=(), converter=as_tuple)
    group: str | None = None
    on_error: Literal["stop", "skip"] = "stop"

    @abstractmethod
    def read(self, split: str) -> Iterable[tuple[str, Mapping[str, Any] | DataError]]:
        """Yield the rows of `split` as they stand, each with its place (`file:line` or `row N`).

        A row that cannot even be read is yielded as the DataError it gives; one that is raised ends the reading.
        Opens what it reads when the first row is asked for, and holds no more rows than it must.
        """

    def load(self, split: str) -> Iterable[Example]:
        """Yield the rows, checked; the first bad one is a DataError that names its place."""
        return strictly(self.examine(split))

    def examine(self, split: str) -> Iterator[tuple[str, Example | DataError]]:
        """Every row with its place, converted; a bad row as its DataError."""
        check_split(self, split)
        schema = self.schema
        place = type(self).__name__
        empty = True
        try:
            for place, row in self.read(split):
                empty = False
                if isinstance(row, DataError):
                    yield place, row
                    continue
                try:
                    if type(row) is not dict and not isinstance(row, Mapping):  # the first is quick
                        raise DataError(f"{place}: expected an object, got {kind_of(row)}")
                    schema = schema or recognise(rename(row, self.columns, place), place)
                    example: Example = to_example(row, schema, place, self.columns, self.labels)
                    if self.group is not None:
                        example = {**example, "group": self._group(row, place)}
                except DataError as error:
                    yield place, error
                    continue
                except RecursionError:
                    yield place, DataError(f"{place}: nested too deeply")
                    continue
                yield place, example
        except DataError as error:
            yield place, error
            return
        if empty:
            yield place, DataError(f"{place}: there are no rows")

    def _group(self, row: Mapping[str, Any], place: str) -> str:
        """The value of the column `group`, as text."""
        value = row.get(self.group or "")
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            raise DataError(f"{place}: expected text or a whole number that names the group ({self.group})")
        return str(value)


def strictly(examined: Iterable[tuple[str, Example | DataError]]) -> Iterator[Example]:
    """The rows of `examine` as `load` gives them: the first bad one is raised, one left out on purpose passed over."""
    for _, row in examined:
        if not isinstance(row, DataError):
            yield row
        elif not isinstance(row, LeftOut):
            raise row


def check_split(source: DataSource, split: str) -> None:
    """Raise ConfigError unless `source` has the split."""
    if split not in source.splits():
        there = ", ".join(map(repr, source.splits()))
        raise ConfigError(f"there is no split {split!r}; there is {there}", f"{type(source).__name__}.split")
