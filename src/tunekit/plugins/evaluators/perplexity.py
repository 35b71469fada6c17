"""Perplexity: how surprised the model is by the held-out answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.evaluation.predicting import row_losses, text_bytes
from tunekit.core.interfaces import Encoded, Evaluator, Measured

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@attrs.frozen(kw_only=True)
class Perplexity(Evaluator):
    """The exponential of the mean negative log-likelihood of the supervised tokens.

    Every token counts the same, whatever batch it is in; computed from logits in float32, never from the loss a model
    reports. Metrics: `nll` in nats a token; `perplexity`, its exponential; and `bits_per_byte`, the same likelihood in
    bits, divided by the bytes of the supervised text in UTF-8, which compares models with different tokenizers. End
    tokens are predicted and have no bytes. A row longer than the context is in windows, or cut, as the trainer's
    `on_long` says; a token sees what stands before it in its window.
    """

    name = "perplexity"
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {
        "perplexity": "min",
        "nll": "min",
        "bits_per_byte": "min",
    }

    def evaluate(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context
    ) -> Mapping[str, float]:
        """Perplexity, mean negative log-likelihood and bits per byte over all supervised tokens of `data`."""
        nats, tokens = row_losses(model, tokenizer, data)
        nll = sum(nats) / sum(tokens)
        size = max(1, sum(text_bytes(tokenizer, row) for row in data))
        # exp overflows beyond 709 nats; such a model is broken, but a number must come back.
        return Measured(
            {"perplexity": math.exp(min(nll, 700.0)), "nll": nll, "bits_per_byte": sum(nats) / math.log(2) / size},
            scores={"nll": [loss / count for loss, count in zip(nats, tokens, strict=True)]},
            weights={"nll": tokens},
        )
