"""TokenF1: how many words the generated answer shares with the reference."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.evaluation.answers import Answer, AnswerEvaluator
from tunekit.core.outcomes import Measured

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@attrs.frozen(kw_only=True)
class TokenF1(AnswerEvaluator):
    """The harmonic mean of precision and recall of the answer's words against the reference's, averaged over rows.

    As the evaluation script of SQuAD has it (Rajpurkar et al., https://arxiv.org/abs/1606.05250): lower case, without
    punctuation and the articles a, an and the, cut at white space; words that come twice count twice. Where nothing is
    left of one of the two, it is 1 if nothing is left of the other, else 0. Metric: `token_f1`, from 0 to 1.

    Args:
        max_new_tokens: an answer is cut after so many tokens.
        max_rows: only so many rows, the first, are asked; None for all.
    """

    name = "token-f1"
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {"token_f1": "max"}

    def compare(self, answers: Sequence[Answer], context: Context) -> Mapping[str, float]:
        """The mean F1 of the answers."""
        scores = [f1(given, expected) for given, expected in answers]
        return Measured({"token_f1": sum(scores) / len(scores)}, scores={"token_f1": scores})


def f1(given: str, expected: str) -> float:
    """The F1 of the words of two texts."""
    ours, theirs = words(given), words(expected)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def words(text: str) -> list[str]:
    """The words of a text, normalised."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()
