"""From a source to encoded rows in the cache: each row is read and encoded once, whatever is then made of the rows."""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import attrs

from tunekit.core.common import distributions
from tunekit.core.data import batching, cache
from tunekit.core.data.batching import supervised_tokens
from tunekit.core.data.codec import Codec
from tunekit.core.data.encoded_rows import Store, StoreWriter
from tunekit.core.data.rows import Placed, digest, no_rows, sound
from tunekit.core.interfaces import DataSource, Encoded, Example, Trainer
from tunekit.errors import DataError

AHEAD = 256
"""Rows that are held at a time, so that the codec can render them together."""
LIBRARIES = ("transformers", "tokenizers", "jinja2")
"""Another version of these may make other tokens of the same text."""


@attrs.frozen
class Windows:
    """What long texts are split into.

    Args:
        size: the most tokens of a window.
        way_out: what a user can do about a long row that is no plain text; "{longest}" stands for its tokens.
    """

    size: int
    way_out: str

    def of(self, tokens: Encoded, row: Example, place: str, codec: Codec) -> list[Encoded]:
        """The windows of a row; DataError for a conversation."""
        if "text" not in row:
            length = len(tokens["input_ids"])
            raise DataError(
                f"{place}: a conversation of {length} tokens, and only plain texts can be split: an answer makes no "
                f"sense without its question. {self.way_out.format(longest=length)} on_long='truncate' or 'drop'"
            )
        return batching.windows(tokens, self.size, codec.tokenizer.bos_token_id)


def encoded(
    source: DataSource,
    split: str,
    *,
    name: str,
    trainer: Trainer,
    codec: Codec,
    windows: Windows | None,
    changed: Counter[str],
) -> Store:
    """Every sound row of a split as tokens, whole, from the cache if it is there.

    Args:
        source: where the rows come from.
        split: one of its splits.
        name: what the run calls it ("train", "validation").
        trainer: says how a row is encoded.
        codec: tokenizer and template.
        windows: what longer texts are split into; None leaves every row whole.
        changed: counts the rows that are not used as they stand, by split and reason.
    """
    store = cache.stored(
        {
            "rows": source.fingerprint(split) or _content(source, split),
            "name": name,
            "on_error": source.on_error,
            "encoding": trainer.encoding(),
            "windows": str(windows),
            "template": codec.template,
            "tokenizer": cache.tokenizer_identity(codec.tokenizer),
            "code": " ".join(cache.code_identity(file) for file in _files(source, trainer)),
            "libraries": " ".join(map(distributions.version, LIBRARIES)),
        },
        lambda writer: _write(writer, source, split, name, trainer, codec, windows),
    )
    changed.update(store.changed)
    if not store.rows:
        raise no_rows(name, store.changed)
    return store


def _write(
    writer: StoreWriter,
    source: DataSource,
    split: str,
    name: str,
    trainer: Trainer,
    codec: Codec,
    windows: Windows | None,
) -> None:
    changed: Counter[str] = Counter()
    for place, row in _ahead(sound(source, split, name, changed), codec):
        tokens = _tokens(row, place, trainer, codec)
        parts = [tokens]
        if windows and len(tokens["input_ids"]) > windows.size:
            parts = windows.of(tokens, row, place, codec)
            changed[f"{name}: split into windows of {windows.size} tokens"] += 1
        content = digest(row)  # the windows of a text fall on one side of a validation share, as equal rows do
        for part in parts:
            writer.add(part, content)
    writer.changed.update(changed)


def _ahead(rows: Iterable[Placed], codec: Codec) -> Iterator[Placed]:
    """The same rows, some of them held at a time, which the codec is told of before they are encoded."""
    rest = iter(rows)
    while some := list(islice(rest, AHEAD)):
        examples = codec.ahead([row for _, row in some])
        yield from zip((place for place, _ in some), examples, strict=True)


def _tokens(row: Example, place: str, trainer: Trainer, codec: Codec) -> Encoded:
    """A row as tokens; DataError with its place if it cannot be one, or if nothing can be learned from it."""
    try:
        tokens = trainer.encode(row, codec)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    if not supervised_tokens(tokens):
        raise DataError(f"{place}: no token of it carries loss, so nothing can be learned from it")
    return tokens


def _content(source: DataSource, split: str) -> str:
    """A hash of every row of a source that has no quicker way to say what it holds."""
    sha = hashlib.sha256()
    for _, row in source.examine(split):
        sha.update(str(row).encode(errors="backslashreplace") if isinstance(row, DataError) else digest(row))
    return sha.hexdigest()


def _files(*components: object) -> list[Path]:
    """The code that rows go through: all of tunekit, and the files of plugins' classes."""
    package = Path(__file__).parents[2]
    classes = [cls for component in components for cls in type(component).__mro__ if cls is not object]
    files = {Path(inspect.getfile(cls)) for cls in classes if cls.__module__ != "abc"}
    return [package, *sorted(file for file in files if not file.is_relative_to(package))]
