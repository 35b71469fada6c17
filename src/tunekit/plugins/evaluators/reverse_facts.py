"""ReverseFacts: whether what was learned in one direction is known in the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import attrs

from tunekit.core.component import Context, check_requirements
from tunekit.core.data.codec import Codec
from tunekit.core.data.rows import sound
from tunekit.core.evaluation.answers import Answer, answers, check_answers
from tunekit.core.evaluation.predicting import row_losses
from tunekit.core.fields import at_least
from tunekit.core.interfaces import DataSource, Encoded, Evaluator
from tunekit.core.outcomes import Measured
from tunekit.errors import DataError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@attrs.frozen(kw_only=True)
class ReverseFacts(Evaluator):
    """Facts asked in the direction in which they were trained, and in the other: the reversal curse.

    A model that was trained on "A is B" may answer who A is, and not who B is (Berglund et al.,
    https://arxiv.org/abs/2309.12288). Metrics: `forward_match` and `reverse_match`, the shares of greedy answers that
    are the reference but for white space; `reversal_gap`, the first less the second; `forward_nll` and `reverse_nll`,
    the mean negative log-likelihoods of the answers in nats a token, in which a fact that is known a little shows
    earlier. The held-out rows of the run play no part.

    Args:
        forward: rows that ask as the training rows state it; the split "train" is read.
        reverse: rows that ask the same facts the other way round, in the same order.
        max_new_tokens: an answer is cut after so many tokens.
    """

    name = "reverse-facts"
    reads_rows = False
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {
        "forward_match": "max",
        "reverse_match": "max",
        "reversal_gap": "min",
        "forward_nll": "min",
        "reverse_nll": "min",
    }

    forward: DataSource
    reverse: DataSource
    max_new_tokens: int = attrs.field(default=32, validator=at_least(1))

    def check(self, context: Context) -> None:
        """The sources must be able to work."""
        for source in (self.forward, self.reverse):
            check_requirements(source)
            source.check(context)

    def check_data(self, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context) -> None:
        """DataError if the sources are no pairs of questions; the held-out rows do not matter."""
        counts = []
        for name in ("forward", "reverse"):
            rows = self._rows(name, tokenizer, context)
            check_answers(self, tokenizer, rows, None)
            counts.append(len(rows))
        if counts[0] != counts[1] or not counts[0]:
            raise DataError(f"ReverseFacts needs as many rows in reverse as forward, got {counts[1]} and {counts[0]}")

    def check_answer(self, expected: str) -> None:
        """Every text is an answer that can be compared with."""

    def evaluate(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context
    ) -> Mapping[str, float]:
        """Matches and likelihoods in both directions."""
        scores: dict[str, list[float]] = {}
        weights: dict[str, list[int]] = {}
        kept: list[Answer] = []
        for name in ("forward", "reverse"):
            rows = self._rows(name, tokenizer, context)
            found = answers(model, tokenizer, rows, self.max_new_tokens)
            scores[f"{name}_match"] = [float(given.split() == expected.split()) for given, expected in found]
            nats, tokens = row_losses(model, tokenizer, rows)
            scores[f"{name}_nll"] = [loss / count for loss, count in zip(nats, tokens, strict=True)]
            weights[f"{name}_nll"] = tokens
            kept += found
        pairs = zip(scores["forward_match"], scores["reverse_match"], strict=True)
        scores["reversal_gap"] = [there - back for there, back in pairs]
        metrics = {name: _mean(scores[name], weights.get(name)) for name in self.better}
        return Measured(
            metrics, scores=scores, weights=weights, details={"given_and_expected": [list(one) for one in kept]}
        )

    def _rows(self, name: str, tokenizer: PreTrainedTokenizerBase, context: Context) -> list[Encoded]:
        codec, found = Codec(tokenizer, context.template), list[Encoded]()
        for place, row in sound(getattr(self, name), "train", name, Counter()):
            try:
                found.append(codec.encode(row, "last"))
            except DataError as error:
                raise DataError(f"ReverseFacts.{name}, {place}: {error}") from None
        return found


def _mean(scores: Sequence[float], weights: Sequence[float] | None) -> float:
    heavy = weights or [1] * len(scores)
    return sum(score * weight for score, weight in zip(scores, heavy, strict=True)) / sum(heavy)
