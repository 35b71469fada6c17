"""TextFiles: plain text, for continued pretraining."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.data.input_files import as_paths, check_encoding, decode, find, open_bytes, without_mark
from tunekit.core.data.row_source import check_split, strictly
from tunekit.core.interfaces import DataSource, Example
from tunekit.errors import ConfigError, DataError


@attrs.frozen(kw_only=True)
class TextFiles(DataSource):
    """Text files, each one text, or cut into several at lines that separate them. Every text is learned whole.

    Args:
        path: a file, a glob pattern (`books/**/*.txt`; its files come sorted), or several of these.
        separator: the line that stands between two texts, such as "<|endoftext|>", or "" for an empty line; it belongs
            to neither. None takes each file as one text.
        pattern: a regular expression that such a line matches as a whole, instead of `separator`.
        encoding: of the files.
        on_error: "stop" at the first text that cannot be read, or "skip" such texts, counted in plan and result.
    """

    name = "text-files"

    path: str | tuple[str, ...] = attrs.field(converter=as_paths)
    separator: str | None = None
    pattern: str | None = None
    encoding: str = "utf-8"
    on_error: Literal["stop", "skip"] = "stop"

    def check(self, context: Context) -> None:
        """The files must be there, and separator and pattern must make sense."""
        find(self.path, "TextFiles.path")
        check_encoding(self.encoding, "TextFiles.encoding")
        if self.separator is not None and self.pattern is not None:
            raise ConfigError("give a separator or a pattern, not both", "TextFiles.pattern")
        if self.separator is not None and "\n" in self.separator:
            raise ConfigError("is one line, without its end; an empty line is ''", "TextFiles.separator")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ConfigError(f"is no regular expression: {error}", "TextFiles.pattern") from None

    def load(self, split: str) -> Iterable[Example]:
        """Yield the texts; DataError names the line that cannot be read."""
        return strictly(self.examine(split))

    def examine(self, split: str) -> Iterator[tuple[str, Example | DataError]]:
        """Each text, without the line ends around it, and as its place the line it begins on."""
        check_split(self, split)
        between = re.compile(self.pattern if self.pattern is not None else re.escape(self.separator or ""))
        whole = self.separator is None and self.pattern is None
        for path in find(self.path, "TextFiles.path"):
            empty = True
            try:
                for place, text in self._texts(path, None if whole else between):
                    if isinstance(text, DataError):
                        yield place, text
                    elif text.strip():
                        yield place, {"text": text.strip("\r\n")}
                    else:
                        continue  # nothing stands between two separators
                    empty = False
            except DataError as error:  # the file cannot be read
                yield path, error
                continue
            if empty:
                yield path, DataError(f"{path}: the file has no text")

    def _texts(self, path: str, between: re.Pattern[str] | None) -> Iterator[tuple[str, str | DataError]]:
        with open_bytes(path) as file:
            lines: list[str] = []
            begin, bad = 1, None
            for number, line in enumerate(file, start=1):
                try:
                    if number == 1:
                        line = without_mark(line, f"{path}:1", self.encoding)
                    text = decode(line, f"{path}:{number}", self.encoding)
                except DataError as error:
                    bad = bad or error
                    continue
                if between is not None and between.fullmatch(text.rstrip("\r\n")):
                    yield f"{path}:{begin}", bad or "".join(lines)
                    lines, begin, bad = [], number + 1, None
                else:
                    lines.append(text)
            yield f"{path}:{begin}", bad or "".join(lines)
