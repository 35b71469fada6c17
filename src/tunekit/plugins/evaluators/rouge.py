"""Rouge: how much of the references the generated answers cover, by rouge-score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.evaluation.answers import Answer, AnswerEvaluator
from tunekit.core.outcomes import Measured


@attrs.frozen(kw_only=True)
class Rouge(AnswerEvaluator):
    """ROUGE F1 of each answer (Lin, https://aclanthology.org/W04-1013), averaged over rows, by rouge-score.

    Metrics, from 0 to 1: `rouge1` and `rouge2` of words and pairs of words, `rougeL` of the longest common
    subsequence of the whole text, `rougeLsum` of that of its lines. Texts are in lower case; all but the letters a to z
    and digits separates words, so it is of use for English alone.

    Args:
        stemmer: whether words are cut to their stems, by Porter's algorithm.
        max_new_tokens: an answer is cut after so many tokens.
        max_rows: only so many rows, the first, are asked; None for all.
    """

    name = "rouge"
    requires = ("rouge_score",)
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {
        "rouge1": "max",
        "rouge2": "max",
        "rougeL": "max",
        "rougeLsum": "max",
    }

    stemmer: bool = False

    def compare(self, answers: Sequence[Answer], context: Context) -> Mapping[str, float]:
        """The mean F1 of the answers."""
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(self.better), use_stemmer=self.stemmer)
        found = [scorer.score(target=expected, prediction=given) for given, expected in answers]
        scores = {name: [float(score[name].fmeasure) for score in found] for name in self.better}
        return Measured({name: sum(column) / len(column) for name, column in scores.items()}, scores=scores)
