"""Which rows are the same: 64-bit hashes of rows and prompts, as they stand and normalised. No row is kept.

Normalised, texts that differ in case, blanks and punctuation are the same; signs that calculate are not punctuation,
and numbers stay apart: "2 + 3" is not "2 - 3", nor "1.5" the same as "15".

Two different rows have the same hash by chance once in about 10^8 data sets of 500,000 rows.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

Form = Literal["messages", "messages with tools", "text", "preference"]
NO_PROMPT = 0
"""The hash of the prompt of a row that has none."""

_CALCULATING = "+-*/=<>^%$"
_KEPT = [code for code in range(128) if chr(code).isalnum() or chr(code) in _CALCULATING]
_LOWER = bytes(code + 32 if 65 <= code <= 90 else code for code in range(256))
_LAYOUT = bytes(sorted({*range(1, 128)} - {*_KEPT}))
_NUMBERS = bytes(code if code == 0 or 48 <= code <= 57 else 32 for code in range(256))
_LETTERS = bytes(code for code in range(256) if code >= 128 or chr(code).isalpha())
_PUNCTUATION = re.compile("[\u00a0\u00a1\u00ab\u00ad\u00b7\u00bb\u00bf\u2000-\u206f\u3000-\u3003\u3008-\u301f\ufeff]+")


class Parts(NamedTuple):
    """A row taken apart.

    Args:
        form: which kind of example it is.
        roles: of its messages, in order; none for plain text.
        prompt: what stands before the last answer; empty for plain text.
        answer: the last answer; both answers of a preference; the text itself.
        more: what messages hold besides role and content, and the tools, as JSON; nearly always empty.
    """

    form: Form
    roles: tuple[str, ...]
    prompt: str
    answer: str
    more: str


def take_apart(row: Mapping[str, Any]) -> Parts:
    """The parts of an example."""
    if "text" in row:
        return Parts("text", (), "", row["text"], "")
    if "chosen" in row:
        sides = [_join(row[side]) for side in ("prompt", "chosen", "rejected")]
        roles = tuple(message["role"] for side in ("prompt", "chosen", "rejected") for message in row[side])
        more = "".join(map(_more, (row["prompt"], row["chosen"], row["rejected"])))
        return Parts("preference", roles, sides[0], f"{sides[1]}\n{sides[2]}", more)
    messages = row["messages"]
    roles = tuple([message["role"] for message in messages])
    contents = [message.get("content") for message in messages]
    if None not in contents and sum(map(len, messages)) == 2 * len(messages):
        prompt, answer, more = "\n".join(contents[:-1]), contents[-1], ""
    else:
        prompt, answer, more = _join(messages[:-1]), messages[-1].get("content") or "", _more(messages)
    if row.get("tools"):
        return Parts("messages with tools", roles, prompt, answer, more + json.dumps(row["tools"], default=str))
    return Parts("messages", roles, prompt, answer, more)


def _join(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(message.get("content") or "" for message in messages)


def _more(messages: Sequence[Mapping[str, Any]]) -> str:
    extras = [{key: item for key, item in message.items() if key not in ("role", "content")} for message in messages]
    return json.dumps(extras, sort_keys=True, default=str) if any(extras) else ""


Normalised = tuple[bytes, tuple[bytes, ...]]
"""What is left of a text, and the numbers in it."""


def normalised(texts: Sequence[str]) -> list[Normalised]:
    """Each text without case, blanks and punctuation, or as it is where nothing would be left; and its numbers.

    All at once: each step runs over the texts joined by a character that none has, which is several times faster.
    """
    if not texts:
        return []
    joined = "\0".join(texts)
    if joined.count("\0") >= len(texts):
        joined = "\0".join(text.replace("\0", " ") for text in texts)
    if not joined.isascii():
        joined = _PUNCTUATION.sub(" ", unicodedata.normalize("NFKC", joined.casefold()))
    data = joined.encode("utf-8", errors="surrogatepass")
    kept = data.translate(_LOWER, _LAYOUT).split(b"\0")
    if not all(kept):
        kept = [some or text.strip() for some, text in zip(kept, data.split(b"\0"), strict=True)]
    numbers = data.translate(_NUMBERS, _LETTERS).split(b"\0")
    return [(some, tuple(found.split())) for some, found in zip(kept, numbers, strict=True)]


class RowHashes:
    """The hashes of many rows, 40 bytes a row."""

    def __init__(self) -> None:
        self.exact, self.alike, self.prompts, self.prompts_alike = (array("q") for _ in range(4))
        self.places = Places()

    def add(self, places: Sequence[str], rows: Sequence[Parts]) -> None:
        """Remember rows."""
        like_prompts = normalised([row.prompt for row in rows])
        like_answers = normalised([row.answer for row in rows])
        self.places.add(places)
        self.exact.extend(map(hash, rows))
        for (form, roles, prompt, _, more), like_prompt, like_answer in zip(
            rows, like_prompts, like_answers, strict=True
        ):
            self.alike.append(hash((form, roles, like_prompt, like_answer, more)))
            self.prompts.append(hash((roles[:-1], prompt, more)) if prompt else NO_PROMPT)
            self.prompts_alike.append(hash((like_prompt, more)) if prompt else NO_PROMPT)

    def __len__(self) -> int:
        return len(self.exact)


class Places:
    """Many places, `file:line` or `row N`, in 12 bytes each."""

    def __init__(self) -> None:
        self._stems: dict[str, int] = {}
        self._names: list[str] = []
        self._stem_of, self._number_of = array("l"), array("q")

    def add(self, places: Iterable[str]) -> None:
        """Remember the next places."""
        for place in places:
            stem = place.rstrip("0123456789")
            digits = place[len(stem) :]
            if not 0 < len(digits) < 18 or digits[0] == "0":
                stem, digits = place, ""
            known = self._stems.setdefault(stem, len(self._names))
            if known == len(self._names):
                self._names.append(stem)
            self._stem_of.append(known)
            self._number_of.append(int(digits) if digits else -1)

    def __getitem__(self, at: int) -> str:
        number = self._number_of[at]
        return self._names[self._stem_of[at]] + (str(number) if number >= 0 else "")


def repeats(hashes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each row that has the hash of an earlier one, and the first that has it, as positions."""
    first: dict[int, int] = {}
    for at, value in enumerate(hashes):
        earlier = first.setdefault(value, at)
        if earlier != at and value != NO_PROMPT:
            yield at, earlier


def shared(ours: Iterable[tuple[int, int]], theirs: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Of (position, hash) pairs, each position of `ours` whose hash is among `theirs`, and the first position there."""
    pairs = [(at, value) for at, value in ours if value != NO_PROMPT]
    wanted = {value for _, value in pairs}
    first: dict[int, int] = {}
    for at, value in theirs:
        if value in wanted:
            first.setdefault(value, at)
    return {at: first[value] for at, value in pairs if value in first}
