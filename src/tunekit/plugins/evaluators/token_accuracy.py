"""TokenAccuracy: how often the most likely token is the right one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.evaluation import evaluating, predictions
from tunekit.core.interfaces import Encoded, Evaluator

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
        right, tokens = 0, 0
        with evaluating(model):
            for logits, labels in predictions(model, tokenizer, data):
                right += int((logits.argmax(dim=-1) == labels).sum())
                tokens += labels.numel()
        return {"token_accuracy": right / tokens}
