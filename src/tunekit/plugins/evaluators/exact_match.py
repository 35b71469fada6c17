"""ExactMatch: how often the generated answer is the reference, word for word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import attrs

from tunekit.core.codec import IGNORED
from tunekit.core.component import Context
from tunekit.core.evaluation import generate
from tunekit.core.fields import at_least
from tunekit.core.interfaces import Encoded, Evaluator
from tunekit.errors import DataError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@attrs.frozen(kw_only=True)
class ExactMatch(Evaluator):
    """The share of rows whose greedy answer equals the reference; white space around and runs within do not count.

    The model is asked with everything before the row's last answer. Metric: `exact_match`, from 0 to 1.

    Args:
        max_new_tokens: an answer is cut after so many tokens, and then seldom right.
        max_rows: only so many rows, the first, are asked; None for all.
    """

    name = "exact-match"
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {"exact_match": "max"}

    max_new_tokens: int = attrs.field(default=64, validator=at_least(1))
    max_rows: int | None = attrs.field(default=None, validator=at_least(1))

    def check_data(self, data: Sequence[Encoded]) -> None:
        """DataError if rows are plain texts, which ask nothing."""
        if not all(prompt for prompt, _ in map(_split, data[: self.max_rows])):
            raise DataError("ExactMatch needs rows with a prompt and an answer; plain texts have none")

    def evaluate(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context
    ) -> Mapping[str, float]:
        """Exact match over the rows."""
        pairs = [_split(row) for row in data[: self.max_rows]]
        answers = generate(model, tokenizer, [prompt for prompt, _ in pairs], self.max_new_tokens)
        right = sum(
            _words(tokenizer, answer) == _words(tokenizer, reference)
            for answer, (_, reference) in zip(answers, pairs, strict=True)
        )
        return {"exact_match": right / len(pairs)}


def _split(row: Encoded) -> tuple[list[int], list[int]]:
    """Tokens before the last answer of a row, and the tokens of that answer."""
    ids, labels = list(row["input_ids"]), row["labels"]
    end = max(at for at, label in enumerate(labels) if label != IGNORED) + 1
    start = end
    while start and labels[start - 1] != IGNORED:
        start -= 1
    return ids[:start], ids[start:end]


def _words(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text.split()
