"""JsonLines: one JSON object a line."""

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import attrs

from tunekit.core.assets import resolve
from tunekit.core.component import Context
from tunekit.core.fields import as_text
from tunekit.core.interfaces import DataSource, Example
from tunekit.core.schemas import SchemaName, recognise, rename, to_example
from tunekit.errors import ConfigError, DataError

_OTHER_ENCODINGS = {
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
}


@attrs.frozen(kw_only=True)
class JsonLines(DataSource):
    """A file with one JSON object a line, in UTF-8. Blank lines are passed over; lines are counted from 1.

    Args:
        path: the file, or `tunekit:orders` for the embedded data.
        schema: "messages", "prompt-completion", "instruction", "question-answer" or "text"; None recognises it.
        columns: for each of the schema's columns that is named otherwise in the file, that other name.
    """

    name = "json-lines"

    path: str = attrs.field(converter=as_text)
    schema: SchemaName | None = None
    columns: Mapping[str, str] | None = None

    def check(self, context: Context) -> None:
        """The file must be there."""
        path = Path(resolve(self.path)).expanduser()
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist"
            raise ConfigError(f"the file {self.path} {what}", "JsonLines.path")

    def load(self, split: str) -> Iterable[Example]:
        """Yield the rows, checked; DataError names a bad one as `file:line: reason (field)`."""
        if split not in self.splits():
            raise ConfigError(f"there is no split {split!r}; there is only 'train'", "JsonLines.split")
        schema, empty = self.schema, True
        for where, row in self._rows():
            schema, empty = schema or recognise(rename(row, self.columns, where), where), False
            yield to_example(row, schema, where, self.columns)
        if empty:
            raise DataError(f"{self.path}: the file has no rows")

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each row and its place as `file:line`."""
        try:
            file = Path(resolve(self.path)).expanduser().open("rb")
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}") from None
        with file:
            # Only \n ends a line: str.splitlines would also split at U+2028 inside of texts.
            for number, line in enumerate(file, start=1):
                where = f"{self.path}:{number}"
                text = _decode(line, where, first=number == 1)
                if text.strip():
                    yield where, _parse(text, where, first=number == 1)


def _decode(line: bytes, where: str, first: bool) -> str:
    if first:
        for mark, encoding in _OTHER_ENCODINGS.items():
            if line.startswith(mark):
                raise DataError(f"{where}: looks like {encoding}; save the file as UTF-8")
        line = line.removeprefix(codecs.BOM_UTF8)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {error.object[error.start]:#04x} is not UTF-8; save the file as UTF-8"
        ) from None


def _parse(text: str, where: str, first: bool) -> dict[str, Any]:
    def refuse_constant(name: str) -> NoReturn:
        raise DataError(f"{where}: {name} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise DataError(f"{where}: the key stands twice ({twice})")
        return row

    if first and text.lstrip().startswith("["):
        raise DataError(
            f"{where}: the file is one JSON array; write one object a line (jq -c '.[]' file.json > file.jsonl)"
        )
    if first and text.lstrip().startswith("<"):
        raise DataError(f"{where}: the file looks like HTML or XML, not like JSON Lines")
    try:
        row = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deeply") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    return row
