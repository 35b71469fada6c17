"""Filtered: the rows of another source that meet a condition."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import attrs

from tunekit.core.component import Context, check_requirements
from tunekit.core.data.row_source import check_split, strictly
from tunekit.core.fields import at_least
from tunekit.core.interfaces import DataSource, Example
from tunekit.errors import ConfigError, DataError, LeftOut

Part = Literal["all", "prompt", "answer"]


def _name_of(given: Any, filtered: Any) -> Any:
    """The name of `keep`, unless one is given."""
    return given or (getattr(filtered.keep, "__qualname__", repr(filtered.keep)) if filtered.keep is not None else "")


@attrs.frozen(kw_only=True)
class Filtered(DataSource):
    """The rows of a source that meet every condition given; the others are counted, by condition, in plan and result.

    Args:
        source: where the rows come from.
        part: the text that lengths and patterns look at: "all" of a row, the "prompt" (all but the last answer) or the
            last "answer"; of a preference, the chosen one.
        min_length: fewest characters of that text.
        max_length: most characters of that text.
        matches: a regular expression that is found in that text.
        lacks: a regular expression that is not found in it.
        unique: whether of equal rows only the first is kept.
        keep: a Python function that is given an example and says whether it is kept. A recipe cannot hold it: it holds
            its name, and what is read from such a recipe refuses to be run until `keep` is given again.
        keep_name: the name of `keep`; it is set by itself.
    """

    name = "filtered"

    source: DataSource
    part: Part = "all"
    min_length: int | None = attrs.field(default=None, validator=at_least(0))
    max_length: int | None = attrs.field(default=None, validator=at_least(1))
    matches: str | None = None
    lacks: str | None = None
    unique: bool = False
    keep: Callable[[Example], bool] | None = attrs.field(default=None, metadata={"recipe": False})
    keep_name: str = attrs.field(default="", converter=attrs.Converter(_name_of, takes_self=True))  # type: ignore[misc]

    @property
    def on_error(self) -> Literal["stop", "skip"]:  # type: ignore[override]
        """As the source says."""
        return self.source.on_error

    def check(self, context: Context) -> None:
        """The patterns must be regular expressions, `keep` must be there, and the source must work."""
        self._check_keep()
        for field, pattern in (("matches", self.matches), ("lacks", self.lacks)):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise ConfigError(f"is no regular expression: {error}", f"Filtered.{field}") from None
        check_requirements(self.source)
        self.source.check(context)

    def splits(self) -> tuple[str, ...]:
        """Those of the source."""
        return self.source.splits()

    def load(self, split: str) -> Iterable[Example]:
        """Yield the rows that are kept."""
        return strictly(self.examine(split))

    def examine(self, split: str) -> Iterator[tuple[str, Example | DataError]]:
        """Every row of the source with its place; one that is left out as `LeftOut`, with the condition."""
        check_split(self, split)
        self._check_keep()
        found, absent = re.compile(self.matches or ""), re.compile(self.lacks or "(?!)")
        seen: set[bytes] = set()
        for place, row in self.source.examine(split):
            if isinstance(row, DataError):
                yield place, row
                continue
            why = self._why_not(row, found, absent, seen)
            yield place, LeftOut(f"{place}: {why}") if why else row

    def _why_not(self, row: Example, found: re.Pattern[str], absent: re.Pattern[str], seen: set[bytes]) -> str:
        text = text_of(row, self.part)
        what = "" if self.part == "all" else f" ({self.part})"
        if self.min_length is not None and len(text) < self.min_length:
            return f"shorter than min_length{what}"
        if self.max_length is not None and len(text) > self.max_length:
            return f"longer than max_length{what}"
        if not found.search(text):
            return f"without what matches asks for{what}"
        if absent.search(text):
            return f"with what lacks forbids{what}"
        if self.keep is not None and not self.keep(row):
            return f"not kept by {self.keep_name}"
        if self.unique:
            content = json.dumps(row, sort_keys=True, default=str).encode()
            digest = hashlib.blake2b(content, digest_size=16).digest()  # 16 bytes a row are remembered, not the rows
            if digest in seen:
                return "equal to an earlier row"
            seen.add(digest)
        return ""

    def _check_keep(self) -> None:
        if self.keep_name and self.keep is None:
            raise ConfigError(
                f"the recipe was saved with the Python function {self.keep_name!r}, which no recipe can hold; make the "
                "source anew with keep=...",
                "Filtered.keep",
            )


def text_of(row: Example, part: Part) -> str:
    """The text of a row, or of a part of it: contents of messages, joined by line ends."""
    if "text" in row:
        return "" if part == "prompt" else str(row["text"])
    asked = row["prompt"] if "chosen" in row else row["messages"][:-1]
    answer = row["chosen"] if "chosen" in row else row["messages"][-1:]
    chosen = {"all": [*asked, *answer], "prompt": asked, "answer": answer}[part]
    return "\n".join(message.get("content") or "" for message in chosen)
