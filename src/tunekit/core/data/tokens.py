"""From text to tokens: control tokens stay apart from text that looks like them, and pieces add up to the whole."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "\ue000", "\ue001"
"""Around the number that stands for a control token while a template is rendered."""
SHORT = 64
"""Characters of texts whose tokens are remembered: headings of turns, which every row repeats."""
REMEMBERED = 4096


class Tokens:
    """Tokenizes text for one tokenizer.

    Args:
        tokenizer: the model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.use_anchors = bool(tokenizer.is_fast)
        self._remembered: dict[tuple[str, bool], list[int]] = {}

    def neutral(self, value: Any) -> Any:
        """`value`, messages or tools, with control tokens in every text replaced by what `ids` spells out as text.

        Without this, a user who writes `<|im_end|>` would end the turn (and a row could train the model to be fooled).
        """
        if isinstance(value, str):
            return self._spelled_pattern.sub(self._placeholder, value)
        if isinstance(value, Mapping):
            return {self.neutral(key): item if key == "role" else self.neutral(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.neutral(item) for item in value]
        return value

    def ids(self, text: str) -> list[int]:
        """Tokens of rendered text, without any added by the tokenizer itself."""
        if OPEN not in text:
            return self._encode(text)
        first, *others = re.split(f"{OPEN}(\\d+){CLOSE}", text)
        ids = [*self._encode(first)]
        for number, text_after in zip(others[::2], others[1::2], strict=True):
            ids += [*self._inner(self._spelled[int(number)], spell_out=True), *self._inner(text_after)]
        return ids

    def pieces(self, text: str, cuts: Sequence[int]) -> list[list[int]]:
        """Tokens of the pieces of `text` between `cuts`, which rise from 0 to its length.

        Each piece is tokenized as it follows what stands before it. Where a token would straddle a cut, the piece after
        it is tokenized on its own, as a model that was asked with what stands before the cut will have to write it.
        """
        anchors = [match.start() for match in self._anchor_pattern.finditer(text)] if self.use_anchors else []
        found: list[list[int]] = []
        for start, end in pairwise(cuts):
            # Text is cut at control tokens before all else, so nothing before the last one changes what comes after it.
            place = bisect_right(anchors, start) - 1
            if place >= 0 and anchors[place] == start:
                place -= 1
            begin = anchors[place] if place >= 0 else 0
            before, joint = self.ids(text[begin:start]), self.ids(text[begin:end])
            if joint[: len(before)] == before:
                found.append(joint[len(before) :])
            else:
                piece = text[start:end]
                found.append(self.ids(piece) if OPEN in piece else self._inner(piece))
        return found

    def whole_text(self, text: str) -> list[int]:
        """Tokens of a text of its own, as the tokenizer begins one, and with an end."""
        ids = self.with_bos(list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False)))
        end = self.tokenizer.eos_token_id
        return ids if ids and ids[-1] == end else [*ids, end]

    def with_bos(self, ids: list[int]) -> list[int]:
        """`ids` beginning with exactly one BOS if the tokenizer begins texts with one."""
        bos = self.tokenizer.bos_token_id
        return [bos, *ids] if self._wants_bos and ids[:1] != [bos] else ids

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of all control tokens."""
        return frozenset(self.tokenizer.convert_tokens_to_ids(self._special))

    def _placeholder(self, match: re.Match[str]) -> str:
        return f"{OPEN}{self._spelled.index(match.group())}{CLOSE}"

    def _inner(self, text: str, spell_out: bool = False) -> list[int]:
        """Tokens of `text` in the middle of a sequence: without the blank that some tokenizers put before a text."""
        if not text:
            return []
        for anchor in ("\n", "a", "."):
            left, both = self._encode(anchor, spell_out), self._encode(anchor + text, spell_out)
            if both[: len(left)] == left:
                return both[len(left) :]
        return self._encode(text, spell_out)

    def _encode(self, text: str, spell_out: bool = False) -> list[int]:
        if not text:
            return []
        known = self._remembered.get((text, spell_out))
        if known is None:
            # verbose: how long a row may be is checked, and said, where all rows are known.
            options = {"add_special_tokens": False, "split_special_tokens": spell_out, "verbose": False}
            known = list(self.tokenizer.encode(text, **options))
            if len(text) <= SHORT and len(self._remembered) < REMEMBERED:
                self._remembered[text, spell_out] = known
        return known

    @cached_property
    def _wants_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and list(self.tokenizer.encode("x"))[:1] == [bos]

    @cached_property
    def _special(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        names = {str(token.content) for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        return sorted(names, key=lambda name: (-len(name), name))

    @cached_property
    def _spelled(self) -> list[str]:
        """What a placeholder may stand for: the control tokens, and the mark of placeholders itself."""
        return [*self._special, OPEN]

    @cached_property
    def _spelled_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._spelled)))

    @cached_property
    def _anchor_pattern(self) -> re.Pattern[str]:
        """Control tokens that are found in the text as it is, whatever stands around them."""
        added = {str(token.content): token for token in self.tokenizer.added_tokens_decoder.values()}
        firm = [name for name in self._special if (token := added.get(name)) and not _depends(token)]
        return re.compile("|".join(map(re.escape, firm)) or "(?!)")


def _depends(token: Any) -> bool:
    return bool(token.normalized or token.single_word or token.lstrip or token.rstrip)
