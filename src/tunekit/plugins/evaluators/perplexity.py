"""Perplexity: how surprised the model is by the held-out answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.data.batching import supervised_tokens
from tunekit.core.data.codec import IGNORED
from tunekit.core.evaluation.predicting import row_losses, text_bytes
from tunekit.core.fields import at_least
from tunekit.core.interfaces import Encoded, Evaluator
from tunekit.core.outcomes import Measured
from tunekit.errors import ConfigError

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

    Args:
        window: rows longer than this, in tokens, are read through a window that slides over them; None reads each row
            at once.
        stride: by so many tokens it slides. Each token is predicted once, from at least `window - stride` tokens
            before it, or all there are: a smaller stride shows more, and costs more. None is half of the window.
    """

    name = "perplexity"
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {
        "perplexity": "min",
        "nll": "min",
        "bits_per_byte": "min",
    }

    window: int | None = attrs.field(default=None, validator=at_least(2))
    stride: int | None = attrs.field(default=None, validator=at_least(1))

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.stride is not None and (self.window is None or self.stride >= self.window):
            raise ConfigError(f"must be below window={self.window}, got {self.stride}", "Perplexity.stride")

    def evaluate(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context
    ) -> Mapping[str, float]:
        """Perplexity, mean negative log-likelihood and bits per byte over all supervised tokens of `data`."""
        if self.window is None:
            nats, tokens = row_losses(model, tokenizer, data)
        else:
            nats, tokens = self._slid(model, tokenizer, data, self.window)
        nll = sum(nats) / sum(tokens)
        size = max(1, sum(text_bytes(tokenizer, row) for row in data))
        # exp overflows beyond 709 nats; such a model is broken, but a number must come back.
        return Measured(
            {"perplexity": math.exp(min(nll, 700.0)), "nll": nll, "bits_per_byte": sum(nats) / math.log(2) / size},
            scores={"nll": [loss / count for loss, count in zip(nats, tokens, strict=True)]},
            weights={"nll": tokens},
        )

    def _slid(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], window: int
    ) -> tuple[list[float], list[int]]:
        """What `row_losses` gives, through the window."""
        seen = [list(views(row, window, self.stride or window // 2)) for row in data]
        losses, counts = row_losses(model, tokenizer, [view for some in seen for view in some])
        ends = list(accumulate(map(len, seen)))
        spans = list(zip([0, *ends], ends, strict=False))
        return [sum(losses[start:end]) for start, end in spans], [sum(counts[start:end]) for start, end in spans]


def views(row: Encoded, window: int, stride: int) -> Iterator[Encoded]:
    """A row as a sliding window shows it: every token once with its label, the last tokens of each window."""
    ids, labels = list(row["input_ids"]), list(row["labels"])
    known = 0
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        view = {"input_ids": ids[start:end], "labels": [IGNORED] * (known - start) + labels[known:end]}
        if supervised_tokens(view):
            yield view
        if end == len(ids):
            return
        known = end
