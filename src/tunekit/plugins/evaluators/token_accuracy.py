"""TokenAccuracy: how often the most likely token is the right one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.evaluation.predicting import evaluating, row_predictions
from tunekit.core.interfaces import Encoded, Evaluator
from tunekit.core.outcomes import Measured

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@attrs.frozen(kw_only=True)
class TokenAccuracy(Evaluator):
    """The share of supervised tokens that are the model's most likely next token, given the true ones before.

    Metric: `token_accuracy`, from 0 to 1.
    """

    name = "token-accuracy"
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {"token_accuracy": "max"}

    def evaluate(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context
    ) -> Mapping[str, float]:
        """Token accuracy over all supervised tokens of `data`."""
        right, tokens = [0] * len(data), [0] * len(data)
        with evaluating(model):
            for numbers, logits, labels in row_predictions(model, tokenizer, data):
                for row, hit in zip(numbers.tolist(), (logits.argmax(dim=-1) == labels).tolist(), strict=True):
                    right[row] += hit
                    tokens[row] += 1
        return Measured(
            {"token_accuracy": sum(right) / sum(tokens)},
            scores={"token_accuracy": [hits / count for hits, count in zip(right, tokens, strict=True)]},
            weights={"token_accuracy": tokens},
        )
