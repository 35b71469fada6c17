"""Writing the rows that a run would take: read from the source again, since no report keeps them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from tunekit.core.inspection.row_hashes import Parts, take_apart
from tunekit.core.interfaces import DataSource
from tunekit.errors import ConfigError, DataError


@attrs.frozen(kw_only=True)
class Corrected:
    """What `Report.write_corrected` has written.

    Args:
        path: the new file.
        rows: rows in it.
        left_out: rows of the source that are not in it, those that the source itself leaves out included.
    """

    path: Path
    rows: int
    left_out: int

    def __str__(self) -> str:
        return f"{self.path}: {self.rows:,} rows written, {self.left_out:,} left out"


def chain(checksum: int, rows: Iterable[Parts]) -> int:
    """A number that depends on all rows so far and their order, within one process; `checksum` is that before."""
    for row in rows:
        checksum = hash((checksum, row))
    return checksum


def write(path: Path, source: DataSource, without: frozenset[str], checksum: int) -> Corrected:
    """Write the sound rows of `source` as JSON Lines, each as an example: `messages`, `text` or a preference.

    Args:
        path: a file that does not exist yet.
        source: its split "train" is read.
        without: places of sound rows that a run does not take.
        checksum: of the sound rows as they were validated.

    Raises:
        ConfigError: the file exists, or its directory does not.
        DataError: the data is not what was validated, or is no JSON, or of several forms; nothing is written then.
    """
    try:
        file = path.open("x", encoding="utf-8", newline="\n")
    except FileExistsError:
        raise ConfigError(f"{path} exists, and is not overwritten; choose another name", "path") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", "path") from None
    try:
        with file:
            counts = {True: 0, False: 0}
            found = 0
            forms: set[str] = set()
            for place, row in source.examine("train"):
                if isinstance(row, DataError):
                    counts[False] += 1
                    continue
                parts = take_apart(row)
                found = chain(found, [parts])
                taken = place not in without
                counts[taken] += 1
                if taken:
                    forms.add(parts.form.partition(" ")[0])  # with tools or without
                    file.write(_line(row, place))
        if found != checksum:
            raise DataError("the data has changed since it was validated; validate it again")
        if len(forms) > 1:
            # One file has one schema: the first row decides how the others are read.
            raise DataError(f"rows of several forms ({', '.join(sorted(forms))}) cannot be in one file")
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Corrected(path=path, rows=counts[True], left_out=counts[False])


def _line(row: Mapping[str, Any], place: str) -> str:
    kept = {key: value for key, value in row.items() if key != "group" or isinstance(value, str)}
    try:
        text = json.dumps(kept, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{place}: cannot be written as JSON: {error}") from None
    # Half of a surrogate pair, which tools may hold, can only be written as an escape.
    return (text if _is_unicode(text) else json.dumps(kept)) + "\n"


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
