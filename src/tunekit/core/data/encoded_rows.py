"""Encoded rows in files: written row by row, read through memory mapping, so that memory does not grow with them."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self, overload

from tunekit.core.data.batching import supervised_tokens
from tunekit.core.interfaces import Encoded

if TYPE_CHECKING:
    from numpy.typing import NDArray

META = "meta.json"
DIGESTS = "digests"
DIGEST_BYTES = 16
BUFFER = 1 << 18
"""Numbers held back before they are written."""


class Store:
    """The rows in one directory, as `StoreWriter` wrote them.

    Each column (`input_ids`, `labels`) has its numbers one row after another in `<column>.values` (int32) and where
    each row ends in `<column>.ends` (int64). `supervised` holds each row's number of supervised tokens (int64), and
    `digests` 16 bytes a row that stand for its content before it was encoded.

    Args:
        directory: where they are; `meta.json` in it names the columns.
    """

    def __init__(self, directory: Path) -> None:
        meta = json.loads((directory / META).read_text(encoding="utf-8"))
        self.directory = directory
        self.rows: int = meta["rows"]
        self.changed: Mapping[str, int] = meta["changed"]
        self._values = {name: _mapped(directory / f"{name}.values", "<i4") for name in meta["columns"]}
        self._ends = {name: _mapped(directory / f"{name}.ends", "<i8") for name in meta["columns"]}
        self.supervised = _mapped(directory / "supervised", "<i8")

    @classmethod
    def open(cls, directory: Path) -> Self | None:
        """The store in `directory` if there is a whole one: after a power failure a file may be shorter than it was."""
        try:
            store = cls(directory)
        except (OSError, ValueError, KeyError):
            return None
        sizes = [(len(store.supervised), store.rows), *((len(ends), store.rows) for ends in store._ends.values())]
        sizes += [(len(values), store._ends[name][-1] if store.rows else 0) for name, values in store._values.items()]
        return store if all(found == expected for found, expected in sizes) else None

    @property
    def lengths(self) -> NDArray[Any]:
        """Tokens of each row, shape (rows,)."""
        import numpy as np

        return np.diff(self._ends["input_ids"], prepend=0)

    def digests(self) -> list[bytes]:
        """What stands for the content of each row: equal rows have equal digests."""
        content = (self.directory / DIGESTS).read_bytes()
        return [content[at : at + DIGEST_BYTES] for at in range(0, len(content), DIGEST_BYTES)]

    def span(self, row: int, start: int, end: int) -> dict[str, NDArray[Any]]:
        """Each column of `row` from `start` up to `end`, or to where it ends before that."""
        found = {}
        for name, ends in self._ends.items():
            first = int(ends[row - 1]) if row else 0
            found[name] = self._values[name][first + start : min(first + end, int(ends[row]))]
        return found


class StoreWriter:
    """Writes rows into an empty directory; used in a `with` block, at whose end the directory holds a `Store`.

    Args:
        directory: an existing, empty one.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._columns: dict[str, tuple[_Column, _Column]] = {}
        self._supervised = _Column(directory / "supervised", "q")
        self._digests = (directory / DIGESTS).open("wb")
        self._rows = 0
        self.changed: dict[str, int] = {}

    def add(self, row: Encoded, digest: bytes) -> None:
        """Append a row; all rows have the same columns."""
        if not self._columns:
            self._columns = {
                name: (_Column(self._directory / f"{name}.values", "i"), _Column(self._directory / f"{name}.ends", "q"))
                for name in row
            }
        for name, (values, ends) in self._columns.items():
            values.extend(row[name])
            ends.extend([values.count])
        self._supervised.extend([supervised_tokens(row)])
        self._digests.write(digest)
        self._rows += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._digests.close()
        for column in (self._supervised, *(column for pair in self._columns.values() for column in pair)):
            column.close()
        if kind is None:
            meta = {"rows": self._rows, "columns": list(self._columns), "changed": self.changed}
            (self._directory / META).write_text(json.dumps(meta), encoding="utf-8")


class EncodedRows(Sequence[Encoded]):
    """Some rows of a store, in order, each whole or a part of it.

    Args:
        store: where the rows are.
        spans: shape (rows, 3): the row's number in the store, and from and up to which token it is taken.
    """

    def __init__(self, store: Store, spans: NDArray[Any]) -> None:
        self._store = store
        self._spans = spans

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, at: int) -> Encoded: ...
    @overload
    def __getitem__(self, at: slice) -> EncodedRows: ...
    def __getitem__(self, at: int | slice) -> Encoded | EncodedRows:
        """A row as lists of numbers, or a part of the rows."""
        if isinstance(at, slice):
            return EncodedRows(self._store, self._spans[at])
        return {name: values.tolist() for name, values in self._store.span(*map(int, self._spans[at])).items()}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        found: list[int] = (self._spans[:, 2] - self._spans[:, 1]).tolist()
        return found

    @property
    def numbers(self) -> list[int]:
        """The number of each row in the store."""
        found: list[int] = self._spans[:, 0].tolist()
        return found

    @property
    def stored(self) -> int:
        """How many rows the store has."""
        return self._store.rows

    def supervised_tokens(self) -> int:
        """Tokens of all rows that carry loss."""
        whole = (self._spans[:, 1] == 0) & (self._spans[:, 2] == self._store.lengths[self._spans[:, 0]])
        parts = EncodedRows(self._store, self._spans[~whole])
        return int(self._store.supervised[self._spans[whole, 0]].sum()) + sum(map(supervised_tokens, parts))

    def digest(self) -> str:
        """A hash of every number of every row in order."""
        sha = hashlib.sha256()
        for row, start, end in self._spans.tolist():
            for name, values in self._store.span(row, start, end).items():
                sha.update(f"{name} {len(values)} ".encode())
                sha.update(values.tobytes())
        return sha.hexdigest()


class _Column:
    """Numbers appended to a file, some at a time; `code` is the type of `array`, as long everywhere tunekit runs."""

    def __init__(self, path: Path, code: str) -> None:
        self._file: BinaryIO = path.open("wb")
        self._held = array(code)
        self.count = 0

    def extend(self, numbers: Sequence[int]) -> None:
        self._held.extend(numbers)
        self.count += len(numbers)
        if len(self._held) > BUFFER:
            self._write()

    def close(self) -> None:
        self._write()
        self._file.close()

    def _write(self) -> None:
        self._held.tofile(self._file)
        del self._held[:]


def _mapped(path: Path, dtype: str) -> NDArray[Any]:
    """A file of numbers as an array that stays in the file."""
    import numpy as np

    if not path.stat().st_size:  # nothing cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")
