"""Perplexity: how surprised the model is by the held-out answers."""

from __future__ import annotations

import math
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
class Perplexity(Evaluator):
    """The exponential of the mean negative log-likelihood of the supervised tokens.

    Every token counts the same, whatever batch it is in; computed from logits in float32, never from the loss a model
    reports. Metrics: `nll` in nats a token, and `perplexity`, its exponential.
    """

    name = "perplexity"
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {"perplexity": "min", "nll": "min"}

    def evaluate(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context
    ) -> Mapping[str, float]:
        """Perplexity and mean negative log-likelihood over all supervised tokens of `data`."""
        from torch.nn.functional import cross_entropy

        total, tokens = 0.0, 0
        with evaluating(model):
            for logits, labels in predictions(model, tokenizer, data):
                total += cross_entropy(logits, labels, reduction="sum").double().item()
                tokens += labels.numel()
        nll = total / tokens
        # exp overflows beyond 709 nats; such a model is broken, but a number must come back.
        return {"perplexity": math.exp(min(nll, 700.0)), "nll": nll}
