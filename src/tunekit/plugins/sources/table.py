"""Table: CSV, TSV, Parquet and Arrow files."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import attrs

from tunekit.core.common.assets import resolve
from tunekit.core.component import Context
from tunekit.core.data.input_files import as_paths, check_encoding, decode, find, open_bytes, without_mark
from tunekit.core.data.row_source import RowSource
from tunekit.core.fields import as_tuple
from tunekit.errors import ConfigError, DataError
from tunekit.plugins.sources.arrow import BATCH, rows_of

Format = Literal["csv", "tsv", "parquet", "arrow"]
_SUFFIXES: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_LONGEST_CELL = (1 << 31) - 1


@attrs.frozen(kw_only=True)
class Table(RowSource):
    """Tables with one row a row of data: CSV, TSV, Parquet or Arrow files.

    CSV and TSV are read by Python's csv module, because readers that guess types change texts: "007" becomes 7 and "NA"
    nothing. Here every cell is the text that it is. A row with too many or too few cells is an error. Parquet and Arrow
    are read by pyarrow.

    Args:
        path: a file, a glob pattern (`data/*.csv`; its files come sorted), or several of these.
        format: "csv", "tsv", "parquet" or "arrow"; None takes what the file's suffix says.
        delimiter: what stands between two cells; None takes a comma in CSV and a tab in TSV.
        quote: what stands around a cell that has delimiters or line ends in it; "" for none, where quotes are text.
        header: names of the columns of a file that has no line of names; None takes the first row.
        encoding: of CSV and TSV files.
    """

    name = "table"

    path: str | tuple[str, ...] = attrs.field(converter=as_paths)
    format: Format | None = None
    delimiter: str | None = None
    quote: str = '"'
    header: tuple[str, ...] | None = attrs.field(default=None, converter=as_tuple)
    encoding: str = "utf-8"

    def check(self, context: Context) -> None:
        """The files must be there, of a known format, and the package that reads it installed."""
        for path in find(self.path, "Table.path"):
            if self._format_of(path) in ("parquet", "arrow") and importlib.util.find_spec("pyarrow") is None:
                raise ConfigError(f"{path} needs pyarrow: pip install pyarrow", "Table.path")
        check_encoding(self.encoding, "Table.encoding")
        for field, text in (("delimiter", self.delimiter or ","), ("quote", self.quote or '"')):
            if len(text) != 1 or text in "\r\n":
                raise ConfigError(f"must be one character, got {text!r}", f"Table.{field}")

    def read(self, split: str) -> Iterator[tuple[str, Mapping[str, Any] | DataError]]:
        """Each row and its place: `file:line` in text, `file: row N` in Parquet and Arrow."""
        for path in find(self.path, "Table.path"):
            kind = self._format_of(path)
            empty = True
            try:
                for place, row in self._text_rows(path, kind) if kind in ("csv", "tsv") else _arrow_rows(path, kind):
                    empty = False
                    yield place, row
            except DataError as error:  # the file as a whole: others may be sound
                yield path, error
                continue
            if empty:
                yield path, DataError(f"{path}: the file has no rows")

    def _format_of(self, path: str) -> Format:
        if self.format is not None:
            return self.format
        suffixes = [suffix.lower() for suffix in Path(path).suffixes if suffix.lower() != ".gz"]
        if not suffixes or suffixes[-1] not in _SUFFIXES:
            raise ConfigError(f"the suffix of {path} names no format; give format='csv' or another", "Table.format")
        return _SUFFIXES[suffixes[-1]]

    def _text_rows(self, path: str, kind: Format) -> Iterator[tuple[str, Mapping[str, Any] | DataError]]:
        # The csv module refuses cells of more than 131,072 characters unless told otherwise: texts may be longer.
        csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
        with open_bytes(path) as file:
            lines = _Lines(file, path, self.encoding)
            cells = csv.reader(
                lines,
                delimiter=self.delimiter or ("\t" if kind == "tsv" else ","),
                quotechar=self.quote or None,
                quoting=csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE,
                strict=True,
            )
            header = self.header
            while True:
                place = f"{path}:{lines.number + 1}"
                try:
                    row = next(cells)
                    if not row:
                        continue  # a blank line
                    if header is None:
                        header = _checked_header(row, place)
                        continue
                    if len(row) != len(header):
                        raise DataError(
                            f"{place}: {len(row)} cells, where there are {len(header)} columns; "
                            "a cell with a delimiter or a quote in it must be quoted"
                        )
                    yield place, dict(zip(header, row, strict=True))
                except StopIteration:
                    return
                except csv.Error as error:
                    quoting = "; if quotes are text here, give quote=''" if self.quote else ""
                    yield place, DataError(f"{place}: not {kind.upper()}: {error}{quoting}")
                except DataError as error:
                    yield place, error
                    if header is None:
                        return  # without its names no row can be read


class _Lines:
    """The lines of a file as text, which goes on after one that is none; `number` counts those that were read."""

    def __init__(self, file: IO[bytes], path: str, encoding: str) -> None:
        self._file, self._path, self._encoding = file, path, encoding
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline()  # \n alone ends it: str.splitlines would also split at U+0085 inside of texts
        if not line:
            raise StopIteration
        self.number += 1
        place = f"{self._path}:{self.number}"
        if self.number == 1:
            line = without_mark(line, place, self._encoding)
        return decode(line, place, self._encoding)


def _checked_header(names: list[str], place: str) -> tuple[str, ...]:
    if "" in names:
        raise DataError(f"{place}: column {names.index('') + 1} has no name; give header=(...)")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{place}: two columns are named {twice[0]!r}")
    return tuple(names)


def _arrow_rows(path: str, kind: Format) -> Iterator[tuple[str, Mapping[str, Any] | DataError]]:
    import pyarrow

    number = 0
    try:
        for batch in _batches(path, kind):
            for row in rows_of(batch):
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cannot be read as {kind} after row {number}: {reason}") from None


def _batches(path: str, kind: Format) -> Iterator[Any]:
    """Record batches of at most BATCH rows; the file is not held in memory."""
    import pyarrow
    from pyarrow import ipc, parquet

    whole = str(Path(resolve(path)).expanduser())
    if kind == "parquet":
        with parquet.ParquetFile(whole, pre_buffer=False, buffer_size=1 << 20) as file:  # not the whole file
            yield from file.iter_batches(batch_size=BATCH)
        return
    with pyarrow.memory_map(whole) as source:
        try:
            opened = ipc.open_file(source)
            found = (opened.get_batch(index) for index in range(opened.num_record_batches))
        except pyarrow.ArrowInvalid:  # `datasets` writes the streaming format
            source.seek(0)
            found = iter(ipc.open_stream(source))
        for batch in found:
            yield from (batch.slice(start, BATCH) for start in range(0, batch.num_rows, BATCH))
