"""Classification: which of a few labels the model answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.data.codec import IGNORED, Codec
from tunekit.core.evaluation.answers import answers, check_answers, split, text
from tunekit.core.evaluation.predicting import row_losses
from tunekit.core.evaluation.statistics import bootstrap
from tunekit.core.fields import as_tuple, at_least
from tunekit.core.interfaces import Encoded, Evaluator
from tunekit.core.outcomes import Measured
from tunekit.errors import ConfigError, DataError
from tunekit.plugins.evaluators.confusion import accuracy, confusion, figures, fold, macro, majority, parse

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn
    from transformers import PreTrainedTokenizerBase

MOST_LABELS = 50
"""More different answers than these are texts, and no labels, unless they are named."""
AT_ONCE = 256
"""Rows whose labels are scored together; the others are not in memory."""


def _are_labels(instance: Any, attribute: Any, value: Any) -> None:
    if value is not None and len({fold(label) for label in value}) < max(2, len(value)):
        raise ConfigError(
            f"must be two labels at least, different but for case, got {value!r}", "Classification.labels"
        )


@attrs.frozen(kw_only=True)
class Classification(Evaluator):
    """Accuracy, precision, recall and F1 of answers that are one of a few labels, beside the majority baseline.

    Metrics: `accuracy`; `above_majority`, the accuracy less that of always answering the most frequent label of these
    rows; `macro_precision`, `macro_recall` and `macro_f1`, plain means over the labels that occur, as the answer of a
    row or of the model (van Rijsbergen 1979; as scikit-learn counts them, with 0 where there is nothing to divide by).
    Details, kept with the run: the figures of each label, the confusion matrix, the majority baseline, the number of
    unparsed answers, and an interval of `macro_f1`. Labels are told apart but for case and punctuation around them.

    Args:
        labels: what a row's answer may be; None takes the answers that occur in the rows.
        method: "likelihood" answers the label to which the model gives most probability, end token included and not
            divided by its length; "generation" reads the label out of the greedy answer, "unparsed" being wrong.
        max_new_tokens: a generated answer is cut after so many tokens.
        max_rows: only so many rows, the first, are asked; None for all.
    """

    name = "classification"
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {
        "accuracy": "max",
        "above_majority": "max",
        "macro_precision": "max",
        "macro_recall": "max",
        "macro_f1": "max",
    }

    labels: tuple[str, ...] | None = attrs.field(default=None, converter=as_tuple, validator=_are_labels)
    method: Literal["likelihood", "generation"] = "likelihood"
    max_new_tokens: int = attrs.field(default=16, validator=at_least(1))
    max_rows: int | None = attrs.field(default=None, validator=at_least(1))

    def check_answer(self, expected: str) -> None:
        """DataError for an answer that is none of the labels."""
        if self.labels and fold(expected) not in map(fold, self.labels):
            raise DataError(f"the answer {expected!r} is none of the labels {', '.join(self.labels)}")

    def check_data(self, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context) -> None:
        """DataError if rows ask nothing, have an answer that is no label, or too few or too many different ones."""
        check_answers(self, tokenizer, data, self.max_rows)
        found = len({fold(text(tokenizer, split(row)[1])) for row in data[: self.max_rows]})
        if self.labels is None and not 2 <= found <= MOST_LABELS:
            raise DataError(
                f"Classification finds {found} different answers in the held-out rows, where 2 to {MOST_LABELS} would "
                "be labels; name them with labels=(...), or hold out more rows"
            )

    def evaluate(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context
    ) -> Mapping[str, float]:
        """The figures of the answers to the rows."""
        expected = [text(tokenizer, split(row)[1]) for row in data[: self.max_rows]]
        spelled = {fold(label): label for label in self.labels or sorted(expected, reverse=True)}
        labels = [spelled[key] for key in (spelled if self.labels else sorted(spelled))]
        truth = [list(map(fold, labels)).index(fold(label)) for label in expected]
        if self.method == "generation":
            asked = answers(model, tokenizer, data, self.max_new_tokens, self.max_rows)
            answered = [parse(answer.given, labels) for answer in asked]
        else:
            tokens = [
                self._tokens(number, label, truth, tokenizer, data, context) for number, label in enumerate(labels)
            ]
            answered = list(_likeliest(model, tokenizer, data[: self.max_rows], tokens))
        return _measured(labels, truth, answered, context.seed)

    @staticmethod
    def _tokens(
        number: int,
        label: str,
        truth: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        data: Sequence[Encoded],
        context: Context,
    ) -> list[int]:
        """The tokens of a label as an answer, with what ends it: as in a row, or encoded like one where none has it."""
        if number in truth:
            return split(data[truth.index(number)])[1]
        talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": label}]
        return split(Codec(tokenizer, context.template).encode({"messages": talk}))[1]


def _likeliest(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], labels: Sequence[Sequence[int]]
) -> Iterator[int]:
    """For each row the number of the label, given as tokens, that is likeliest to follow its prompt."""
    for start in range(0, len(data), AT_ONCE):
        prompts = [split(row)[0] for row in data[start : start + AT_ONCE]]
        rows: list[Encoded] = [
            {"input_ids": [*prompt, *label], "labels": [IGNORED] * len(prompt) + [*label]}
            for prompt in prompts
            for label in labels
        ]
        losses = row_losses(model, tokenizer, rows)[0]
        for at in range(0, len(losses), len(labels)):
            some = losses[at : at + len(labels)]
            yield some.index(min(some))


def _measured(labels: Sequence[str], truth: Sequence[int], answered: Sequence[int], seed: int) -> Measured:
    import numpy as np

    size = len(labels)
    matrix = confusion(truth, answered, size)
    number, always = majority(matrix)
    means = macro(matrix)
    cells = np.array(truth) * (size + 1) + np.array(answered)

    def drawn_f1(rows: NDArray[Any]) -> float:
        return macro(np.bincount(cells[rows], minlength=size * (size + 1)).reshape(size, size + 1).tolist()).f1

    return Measured(
        {
            "accuracy": accuracy(matrix),
            "above_majority": accuracy(matrix) - accuracy(always),
            "macro_precision": means.precision,
            "macro_recall": means.recall,
            "macro_f1": means.f1,
        },
        scores={"accuracy": [float(true == given) for true, given in zip(truth, answered, strict=True)]},
        details={
            "classes": {label: found._asdict() for label, found in zip(labels, figures(matrix), strict=True)},
            "confusion": {"lines": "truth", "columns": [*labels, "unparsed"], "counts": matrix},
            "majority": {"label": labels[number], "accuracy": accuracy(always), "macro_f1": macro(always).f1},
            "unparsed": sum(line[-1] for line in matrix),
            "macro_f1_interval": bootstrap(drawn_f1, len(truth), seed=seed),
        },
    )
