"""Bleu: how many n-grams the generated answers share with the references, by sacrebleu."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.evaluation.answers import Answer, AnswerEvaluator
from tunekit.core.outcomes import Measured


@attrs.frozen(kw_only=True)
class Bleu(AnswerEvaluator):
    """BLEU of all answers as one corpus (Papineni et al., https://aclanthology.org/P02-1040), by sacrebleu.

    Precisions of n-grams up to four and the brevity penalty are of the whole corpus; it is no mean over rows. Metric:
    `bleu`, from 0 to 100. Details: sacrebleu's signature, which says tokenizer, case and smoothing (Post,
    https://arxiv.org/abs/1804.08771), the precisions and the lengths in words.

    Args:
        tokenize: how sacrebleu cuts words: "13a" as in mteval-v13a, "intl", "char", "zh", "none".
        lowercase: whether case does not count.
        max_new_tokens: an answer is cut after so many tokens.
        max_rows: only so many rows, the first, are asked; None for all.
    """

    name = "bleu"
    requires = ("sacrebleu",)
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {"bleu": "max"}

    tokenize: Literal["13a", "intl", "char", "zh", "none"] = "13a"
    lowercase: bool = False

    def compare(self, answers: Sequence[Answer], context: Context) -> Mapping[str, float]:
        """BLEU of the answers, and how it comes about."""
        from sacrebleu.metrics import BLEU

        # Text as read from files has its line breaks; sacrebleu wants a line a sentence, and warns of blanks no more.
        bleu = BLEU(tokenize=self.tokenize, lowercase=self.lowercase, force=True)
        given, expected = ([" ".join(text.split()) for text in texts] for texts in zip(*answers, strict=True))
        found = bleu.corpus_score(given, [expected])
        return Measured(
            {"bleu": float(found.score)},
            details={
                "signature": str(bleu.get_signature()),
                "precisions": list(found.precisions),
                "brevity_penalty": found.bp,
                "answer_words": found.sys_len,
                "reference_words": found.ref_len,
            },
        )
