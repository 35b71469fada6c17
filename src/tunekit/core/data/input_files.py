"""The files a source reads: found by name or pattern, and opened with gzip taken off."""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tunekit.core.common.assets import resolve
from tunekit.core.fields import as_text, did_you_mean
from tunekit.errors import ConfigError, DataError

_GZIP = b"\x1f\x8b"
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def as_paths(value: Any) -> Any:
    """Converter: a path as text, several as a tuple of texts; anything else as it is, for the type check to judge."""
    return tuple(map(as_text, value)) if isinstance(value, list | tuple) else as_text(value)


def find(path: str | tuple[str, ...], field: str) -> list[str]:
    """The files that a path, a glob pattern (`data/*.jsonl`, `**` for any depth) or several of them name.

    The files of a pattern come sorted by name, so that the order of rows is the same everywhere.

    Raises:
        ConfigError: naming `field`, if a file is not there or a pattern matches none.
    """
    found: list[str] = []
    for name in (path,) if isinstance(path, str) else path:
        whole = Path(resolve(name)).expanduser()
        if whole.is_file():
            found.append(name)
        elif whole.is_dir():
            raise ConfigError(f"{name} is a directory; write which of its files ({name}/*.jsonl)", field)
        elif glob.has_magic(name):
            every = glob.iglob(str(whole), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
            matches = sorted(match for match in every if Path(match).is_file())
            if not matches:
                raise ConfigError(f"no file matches {name}", field)
            found += matches
        else:
            siblings = [file.name for file in whole.parent.iterdir()] if whole.parent.is_dir() else []
            near = did_you_mean(whole.name, siblings)
            raise ConfigError(f"the file {name} does not exist{near if near.startswith('; did') else ''}", field)
    if not found:
        raise ConfigError("no file is named", field)
    return found


def content_of(paths: list[str]) -> str:
    """A hash of every byte of these files."""
    sha = hashlib.sha256()
    for path in paths:
        with Path(resolve(path)).expanduser().open("rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()


@contextmanager
def open_bytes(path: str) -> Iterator[IO[bytes]]:
    """A file for reading, unpacked if its first bytes say gzip. What goes wrong in reading it is a DataError."""
    try:
        with Path(resolve(path)).expanduser().open("rb") as file:
            if file.peek(2)[:2] == _GZIP:
                # Buffered: GzipFile alone reads lines slowly.
                with gzip.GzipFile(fileobj=file) as unpacked, io.BufferedReader(unpacked, 1 << 17) as buffered:
                    yield buffered
            else:
                yield file
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is cut off or damaged: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def without_mark(line: bytes, where: str, encoding: str = "utf-8") -> bytes:
    """The first line of a file without UTF-8's byte order mark; DataError if the mark is that of another encoding."""
    for mark, name in _MARKS.items():
        if line.startswith(mark):
            raise DataError(f"{where}: looks like {name}; save the file as {encoding.upper()}")
    return line.removeprefix(codecs.BOM_UTF8)


def decode(line: bytes, where: str, encoding: str = "utf-8") -> str:
    """Bytes as text; DataError that names the first byte which is none in that encoding."""
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        name = "UTF-8" if encoding == "utf-8" else encoding
        raise DataError(
            f"{where}: byte {error.object[error.start]:#04x} is not {name}; save the file as {name}"
        ) from None


def check_encoding(encoding: str, field: str) -> None:
    """Raise ConfigError unless Python knows the encoding and its line ends are single bytes, as in ASCII."""
    try:
        one_byte = "\n".encode(encoding) == b"\n"
    except LookupError:
        raise ConfigError(f"there is no encoding {encoding!r}", field) from None
    if not one_byte:
        raise ConfigError(f"files in {encoding} cannot be read line by line; save the file as UTF-8", field)
