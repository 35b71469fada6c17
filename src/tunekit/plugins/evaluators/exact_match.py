"""ExactMatch: how often the generated answer is the reference, word for word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.evaluation.answers import Answer, AnswerEvaluator
from tunekit.core.outcomes import Measured


@attrs.frozen(kw_only=True)
class ExactMatch(AnswerEvaluator):
    """The share of rows whose greedy answer equals the reference; white space around and runs within do not count.

    The model is asked with everything before the row's last answer. Metric: `exact_match`, from 0 to 1.

    Args:
        max_new_tokens: an answer is cut after so many tokens, and then seldom right.
        max_rows: only so many rows, the first, are asked; None for all.
    """

    name = "exact-match"
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {"exact_match": "max"}

    def compare(self, answers: Sequence[Answer], context: Context) -> Mapping[str, float]:
        """Exact match over the answers."""
        right = [float(given.split() == expected.split()) for given, expected in answers]
        return Measured({"exact_match": sum(right) / len(right)}, scores={"exact_match": right})
