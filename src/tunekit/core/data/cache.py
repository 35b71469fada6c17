"""Encoded rows kept between runs: each set in a directory named by a hash of everything it depends on.

An entry is written beside its place and renamed into it, so it is whole or not there, also where several processes make
the same one. Nothing in an entry is ever changed: what depends on anything else has another name.
"""

from __future__ import annotations

import atexit
import datetime
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from tunekit.core.common.table import table
from tunekit.core.data.encoded_rows import META, Store, StoreWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VARIABLE = "TUNEKIT_CACHE"
"""Environment variable: the cache's directory, or "off" for none, when rows are kept until the process ends."""


@attrs.frozen(kw_only=True)
class CacheEntry:
    """One encoded set of rows.

    Args:
        directory: where it is; deleting it is safe while no run uses it.
        rows: how many rows it holds.
        size: bytes on the disk.
        used: when a run last asked for it, in UTC.
    """

    directory: Path
    rows: int
    size: int
    used: datetime.datetime


@attrs.frozen(kw_only=True)
class CacheInfo:
    """What is in the cache of encoded rows; prints as a table.

    Args:
        directory: the cache.
        entries: what it holds, the one used last first.
    """

    directory: Path
    entries: tuple[CacheEntry, ...]

    @property
    def size(self) -> int:
        """Bytes on the disk, all entries together."""
        return sum(entry.size for entry in self.entries)

    def clear(self) -> None:
        """Delete every entry; what a run asks for again is encoded again."""
        for entry in self.entries:
            shutil.rmtree(entry.directory, ignore_errors=True)

    def __str__(self) -> str:
        lines = [
            [entry.directory.name[:12], f"{entry.rows:,}", _mib(entry.size), f"{entry.used:%Y-%m-%d %H:%M}"]
            for entry in self.entries
        ]
        return f"{self.directory}: {_mib(self.size)}\n" + table(["entry", "rows", "size", "last used"], lines)


def cache_info() -> CacheInfo:
    """What is in the cache of encoded rows, and where it is: `TUNEKIT_CACHE`, else `~/.cache/tunekit`."""
    root = _root()
    entries = [_describe(meta.parent) for meta in root.glob(f"*/{META}") if not meta.parent.name.startswith(".")]
    return CacheInfo(directory=root, entries=tuple(sorted(entries, key=lambda entry: entry.used, reverse=True)))


def stored(ingredients: Mapping[str, str], write: Callable[[StoreWriter], None]) -> Store:
    """The store that `write` makes of these ingredients: the one that is kept, else a new one.

    Args:
        ingredients: everything the rows depend on, by name.
        write: adds every row; what it raises leaves nothing behind.
    """
    key = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
    place = _root() / key
    if (kept := Store.open(place)) is not None:
        os.utime(place)
        return kept
    scratch = Path(tempfile.mkdtemp(prefix=".", dir=place.parent))
    try:
        with StoreWriter(scratch) as writer:
            write(writer)
        shutil.rmtree(place, ignore_errors=True)  # what is there is not whole
        scratch.rename(place)
    except OSError:
        if (kept := Store.open(place)) is None:
            raise
        return kept  # another process was first
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Store(place)


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a tokenizer makes of texts: its vocabulary, its rules and its special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else dict(sorted(tokenizer.get_vocab().items()))
    # Set by each call for itself, and left there.
    rules = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
    stated = [type(tokenizer).__name__, rules, _settings(tokenizer)]
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def _settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What a tokenizer was made with, but for where it came from."""
    return {name: repr(value) for name, value in tokenizer.init_kwargs.items() if not name.endswith("name_or_path")}


@cache
def code_identity(file: Path) -> str:
    """A hash of a Python file, or of all those in a directory: rows made by other code are other rows."""
    files = sorted(file.rglob("*.py")) if file.is_dir() else [file]
    sha = hashlib.sha256()
    for path in files:
        sha.update(path.read_bytes())
    return sha.hexdigest()


def _root() -> Path:
    """The cache's directory, made if need be; one that lasts as long as the process where none can be made."""
    named = os.environ.get(VARIABLE)
    if named != "off":
        root = Path(named or Path.home() / ".cache" / "tunekit").expanduser() / "encoded"
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError:
            return _passing()
        if os.access(root, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            return root
    return _passing()


@cache
def _passing() -> Path:
    root = Path(tempfile.mkdtemp(prefix="tunekit-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def _describe(place: Path) -> CacheEntry:
    files = [file.stat() for file in place.iterdir()]
    return CacheEntry(
        directory=place,
        rows=json.loads((place / META).read_text(encoding="utf-8"))["rows"],
        size=sum(file.st_size for file in files),
        used=datetime.datetime.fromtimestamp(place.stat().st_mtime, datetime.UTC),
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
