"""What evaluators that read answers stand on: rows as question and answer, answers generated once for all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import attrs

from tunekit.core.component import Context
from tunekit.core.data.batching import lengths
from tunekit.core.data.codec import IGNORED
from tunekit.core.evaluation.predicting import generate
from tunekit.core.fields import at_least
from tunekit.core.interfaces import Encoded, Evaluator
from tunekit.errors import DataError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


class Answer(NamedTuple):
    """What the model answered, and what the row says, both without special tokens and white space around them."""

    given: str
    expected: str


class Asked(Sequence[Encoded]):
    """Rows that remember what one model, as it stands, answered: made anew for every evaluation.

    Args:
        rows: the rows.
    """

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self._rows = rows
        self.answers: dict[int, dict[int, str]] = {}
        """By `max_new_tokens`, the answer to each row asked so far, by its number."""

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> Encoded: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Encoded]: ...
    def __getitem__(self, at: int | slice) -> Encoded | Sequence[Encoded]:
        """A row, or some of the rows."""
        return self._rows[at]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return lengths(self._rows)


@attrs.frozen(kw_only=True)
class AnswerEvaluator(Evaluator):
    """An evaluator of generated answers: a subclass gives `compare`. Rows are asked once for all that are alike.

    The model is asked with everything before a row's last answer, and answers greedily.

    Args:
        max_new_tokens: an answer is cut after so many tokens.
        max_rows: only so many rows, the first, are asked; None for all.
    """

    max_new_tokens: int = attrs.field(default=64, validator=at_least(1))
    max_rows: int | None = attrs.field(default=None, validator=at_least(1))

    @abstractmethod
    def compare(self, answers: Sequence[Answer], context: Context) -> Mapping[str, float]:
        """The metrics of these answers, in the order of the rows; best as `Measured`."""

    def check_answer(self, expected: str) -> None:
        """Raise DataError if an answer of the rows is none that can be compared with. Default: all can."""

    def check_data(self, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context) -> None:
        """DataError if rows are plain texts, which ask nothing, or have an answer that `check_answer` refuses."""
        check_answers(self, tokenizer, data, self.max_rows)

    def evaluate(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context
    ) -> Mapping[str, float]:
        """The metrics of the answers to the rows."""
        return self.compare(answers(model, tokenizer, data, self.max_new_tokens, self.max_rows), context)


def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[Encoded],
    max_new_tokens: int,
    max_rows: int | None = None,
) -> list[Answer]:
    """The greedy answers to the first `max_rows` rows; within one evaluation, no row is asked twice."""
    pairs = [split(row) for row in data[:max_rows]]
    # A dictionary of this call alone where `data` was not made by `measure`.
    known = getattr(data, "answers", {}).setdefault(max_new_tokens, {})
    new = [at for at in range(len(pairs)) if at not in known]
    found = generate(model, tokenizer, [pairs[at][0] for at in new], max_new_tokens) if new else []
    known |= {at: text(tokenizer, ids) for at, ids in zip(new, found, strict=True)}
    return [Answer(known[at], text(tokenizer, expected)) for at, (_, expected) in enumerate(pairs)]


def check_answers(
    evaluator: Any, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], rows: int | None
) -> None:
    """DataError for the first of the first `rows` rows that asks nothing, or that `evaluator.check_answer` refuses."""
    for number, (prompt, answer) in enumerate(map(split, data[:rows]), start=1):
        if not prompt:
            raise DataError(
                f"{type(evaluator).__name__} needs rows with a prompt and an answer; plain texts have none "
                f"(held-out row {number})"
            )
        try:
            evaluator.check_answer(text(tokenizer, answer))
        except DataError as error:
            raise DataError(f"{type(evaluator).__name__}, held-out row {number}: {error}") from None


def split(row: Encoded) -> tuple[list[int], list[int]]:
    """Tokens before the last answer of a row, and the tokens of that answer."""
    ids, labels = list(row["input_ids"]), row["labels"]
    end = max(at for at, label in enumerate(labels) if label != IGNORED) + 1
    start = end
    while start and labels[start - 1] != IGNORED:
        start -= 1
    return ids[:start], ids[start:end]


def text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer, without special tokens and white space around it."""
    found = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(found, str)
    return found.strip()
