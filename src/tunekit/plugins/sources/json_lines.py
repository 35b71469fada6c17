"""JsonLines: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import attrs

from tunekit.core.component import Context
from tunekit.core.data.input_files import as_paths, content_of, decode, find, open_bytes, without_mark
from tunekit.core.data.row_source import RowSource
from tunekit.errors import DataError

_BLOCK = 1 << 16
"""Bytes of lines that are read at a time."""

_BLANKS = " \t\r\n"
"""What JSON takes for blanks; `str.isspace` takes more."""

_COLON, _QUOTE, _BLANK = ord(":"), ord('"'), ord(" ")


@attrs.frozen(kw_only=True)
class JsonLines(RowSource):
    """Files with one JSON object a line, in UTF-8, gzip or not. Blank lines are passed over; lines are counted from 1.

    Args:
        path: a file, a glob pattern (`data/*.jsonl`; its files come sorted), several of these, or `tunekit:orders` for
            the embedded data.
    """

    name = "json-lines"

    path: str | tuple[str, ...] = attrs.field(converter=as_paths)

    def check(self, context: Context) -> None:
        """The files must be there."""
        find(self.path, "JsonLines.path")

    def fingerprint(self, split: str) -> str:
        """The fields, and a hash of the files."""
        return f"{self} {content_of(find(self.path, 'JsonLines.path'))}"

    def read(self, split: str) -> Iterator[tuple[str, Mapping[str, Any] | DataError]]:
        """Each row and its place as `file:line`."""
        for path in find(self.path, "JsonLines.path"):
            try:
                yield from _read(path)
            except DataError as error:  # the file as a whole: others may be sound
                yield path, error


def _read(path: str) -> Iterator[tuple[str, Mapping[str, Any] | DataError]]:
    number, empty = 0, True
    with open_bytes(path) as file:
        # Only \n ends a line: str.splitlines would also split at U+2028 inside of texts.
        while lines := file.readlines(_BLOCK):
            if number == 0:
                try:
                    lines[0] = without_mark(lines[0], f"{path}:1")
                except DataError as error:
                    yield f"{path}:1", error
                    return
                unlike = _unlike_json_lines(lines[0])
                if unlike:
                    yield f"{path}:1", DataError(f"{path}:1: {unlike}")
                    return
            for line, row in zip(lines, parse_quickly(lines), strict=True):
                number += 1
                if row is not None:
                    empty = False
                    yield f"{path}:{number}", row
                elif line.strip():
                    empty = False
                    place = f"{path}:{number}"
                    try:
                        yield place, parse_strictly(decode(line, place), place)
                    except DataError as error:
                        yield place, error
    if empty:
        yield path, DataError(f"{path}: the file has no rows")


def _unlike_json_lines(line: bytes) -> str:
    """What a file is that begins with this line, if it is none of ours: one error says it, instead of one a line."""
    if line.lstrip().startswith(b"["):
        return "the file is one JSON array; write one object a line (jq -c '.[]' file.json > file.jsonl)"
    if line.lstrip().startswith(b"<"):
        return "the file looks like HTML or XML, not like JSON Lines"
    return ""


def parse_quickly(lines: list[bytes]) -> list[dict[str, Any] | None]:
    """For each line the object on it, or None where that is not certain: blank lines, and all that is not sound JSON.

    Sound files are read at the speed of `json.loads`: the decoder runs over many lines of text as they stand, and keys
    that stand twice are found by counting, over all of these lines together.
    """
    block = b"".join(lines)
    rows: list[dict[str, Any] | None] = []
    keys = at = 0
    try:
        text = block.decode("utf-8")
        while at < len(text):
            row, at = _decode(text, at)
            if text[at : at + 1] != "\n":
                if text[at : at + 2] == "\r\n":
                    at += 1
                elif at != len(text):
                    break
            at += 1
            rows.append(row)
            keys += len(row)
            for value in row.values():
                if type(value) is list:
                    for item in value:
                        if type(item) is dict:
                            keys += len(item)
    except (ValueError, AttributeError, TypeError, RecursionError):  # no JSON, or a row that is no object
        rows = []
    # Each row ends where a line ends, so if there are as many rows as lines, none began on one and ended on another.
    if len(rows) == len(lines) and _has_so_many_keys(block, keys):
        return rows
    return [_parse_line(line) for line in lines]


def _has_so_many_keys(block: bytes, count: int) -> bool:
    """Whether it is certain that `block`, sound JSON lines, has no more keys than `count`, those that were parsed.

    A colon that follows a key has before it the quote that ends the key, or blanks and that quote. Any other colon is
    within a text. So if none comes after a quote and blanks, there are at most as many keys as colons after a quote.
    """
    import numpy

    data = numpy.frombuffer(block, dtype=numpy.uint8)
    before, colon = data[:-1], data[1:] == _COLON
    if int(numpy.count_nonzero(colon & (before == _QUOTE))) != count:
        return False
    further = data[numpy.flatnonzero(colon & (before <= _BLANK)) - 1]
    return not bool(((further == _QUOTE) | (further <= _BLANK)).any())


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """One line as an object, or None where that is not certain."""
    try:
        text = line.decode("utf-8")
        row, end = _decode(text)
    except (ValueError, RecursionError):
        return None
    sound = type(row) is dict and not text[end:].strip(_BLANKS) and _has_each_key_once(row, text)
    return row if sound else None


def _has_each_key_once(row: dict[str, Any], text: str) -> bool:
    """Whether it is certain that no key stands twice in any object of `text`, from which `row` was parsed.

    JSON has one colon for each key, and besides those only colons within texts. If there are as many colons as `row`
    has keys and colons in its values, none is left for a key that was overwritten. A colon written as an escape
    (`\\u003a`) would be counted in the value alone, so then nothing is certain.
    """
    return text.count(":") == _colons(row) and "\\u003" not in text


def _colons(value: Any) -> int:
    """Keys, and colons in texts, within a parsed value. Those in keys are left out, which errs on the safe side."""
    count = 0
    if type(value) is dict:
        count = len(value)
        value = value.values()
    for item in value:
        if type(item) is str:
            count += item.count(":")
        elif type(item) is dict or type(item) is list:
            count += _colons(item)
    return count


def parse_strictly(text: str, where: str) -> dict[str, Any]:
    """One line as an object: no key twice, no NaN. Raises DataError with the place."""

    def refuse_constant(name: str) -> NoReturn:
        raise DataError(f"{where}: {name} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            # A key may hold what no terminal can show.
            raise DataError(f"{where}: the key stands twice ({twice.encode(errors='backslashreplace').decode()})")
        return row

    try:
        row = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique)
    except DataError:
        raise
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deeply") from None
    except ValueError:
        raise DataError(f"{where}: a number of too many digits") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    return row


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)


_decode = json.JSONDecoder(parse_constant=_refuse).raw_decode
