"""Chrf: how many character n-grams the generated answers share with the references, by sacrebleu."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.evaluation.answers import Answer, AnswerEvaluator
from tunekit.core.fields import at_least
from tunekit.core.outcomes import Measured


@attrs.frozen(kw_only=True)
class Chrf(AnswerEvaluator):
    """chrF2 of all answers as one corpus (Popović, https://aclanthology.org/W15-3049), by sacrebleu.

    The F-score of character n-grams up to six, recall weighing twice as much as precision, white space left out; it is
    no mean over rows. Metric: `chrf`, from 0 to 100. Details: sacrebleu's signature.

    Args:
        word_order: word n-grams up to this many count as well; 2 makes it chrF++.
        lowercase: whether case does not count.
        max_new_tokens: an answer is cut after so many tokens.
        max_rows: only so many rows, the first, are asked; None for all.
    """

    name = "chrf"
    requires = ("sacrebleu",)
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {"chrf": "max"}

    word_order: int = attrs.field(default=0, validator=at_least(0))
    lowercase: bool = False

    def compare(self, answers: Sequence[Answer], context: Context) -> Mapping[str, float]:
        """The chrF of the answers."""
        from sacrebleu.metrics import CHRF

        chrf = CHRF(word_order=self.word_order, lowercase=self.lowercase)
        given, expected = zip(*answers, strict=True)
        found = chrf.corpus_score(given, [expected])
        return Measured({"chrf": float(found.score)}, details={"signature": str(chrf.get_signature())})
