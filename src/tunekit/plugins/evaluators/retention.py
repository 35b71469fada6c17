"""Retention: what the model could do before, and how much of it training has cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Literal

import attrs

from tunekit.core.component import Context, check_requirements
from tunekit.core.data.batching import supervised_tokens, windows
from tunekit.core.data.codec import Codec
from tunekit.core.data.rows import sound
from tunekit.core.evaluation.predicting import row_losses
from tunekit.core.fields import at_least
from tunekit.core.interfaces import DataSource, Encoded, Evaluator
from tunekit.core.model.base import context_length
from tunekit.core.outcomes import Measured
from tunekit.errors import DataError, TrainingError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@attrs.frozen(kw_only=True)
class Retention(Evaluator):
    """The perplexity of general rows of the user's own, which are not trained on, and its change against the base.

    Metrics: `retention_nll`, the mean negative log-likelihood of the rows' supervised tokens in nats, each token
    weighing the same; `retention_perplexity`, its exponential; `forgetting`, `retention_nll` less that of the base,
    which a run measures before training: no second model is held, and no method has to be switched off. Of the base
    itself, and outside of a run, it is 0. The held-out rows of the run play no part, but without any nothing is
    evaluated.

    Args:
        source: where the rows come from; its split "train" is read.
        max_rows: only so many rows, the first, are read.
        max_length: longer texts are cut into windows of so many tokens, and of half of the model's context at most; a
            token sees what stands before it in its window. Longer conversations are left out.
    """

    name = "retention"
    reads_rows = False
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {
        "forgetting": "min",
        "retention_nll": "min",
        "retention_perplexity": "min",
    }

    source: DataSource
    max_rows: int = attrs.field(default=200, validator=at_least(1))
    max_length: int = attrs.field(default=512, validator=at_least(8))

    def check(self, context: Context) -> None:
        """The source must be able to work."""
        check_requirements(self.source)
        self.source.check(context)

    def check_data(self, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context) -> None:
        """DataError if the source has no row to measure; the held-out rows do not matter."""
        self._rows(tokenizer, self.max_length, context)

    def evaluate(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context
    ) -> Mapping[str, float]:
        """Perplexity on the source, against the base's."""
        room = (context_length(model.config) or 2 * self.max_length) // 2  # the other half may hold virtual tokens
        nats, tokens = row_losses(model, tokenizer, self._rows(tokenizer, min(self.max_length, room), context))
        nll = sum(nats) / sum(tokens)
        base = nll if context.base_metrics is None else context.base_metrics.get("retention_nll")
        if base is None:
            raise TrainingError("Retention did not measure the base of this run, so nothing can be said of forgetting")
        return Measured(
            {"forgetting": nll - base, "retention_nll": nll, "retention_perplexity": math.exp(min(nll, 700.0))},
            scores={"retention_nll": [loss / count for loss, count in zip(nats, tokens, strict=True)]},
            weights={"retention_nll": tokens},
        )

    def _rows(self, tokenizer: PreTrainedTokenizerBase, longest: int, context: Context) -> list[Encoded]:
        """The rows of the source as tokens; DataError if there are none."""
        codec = Codec(tokenizer, context.template)
        found: list[Encoded] = []
        for place, row in islice(sound(self.source, "train", "retention", Counter()), self.max_rows):
            try:
                tokens = codec.encode(row)
            except DataError as error:
                raise DataError(f"Retention.source, {place}: {error}") from None
            if len(tokens["input_ids"]) <= longest:
                found.append(tokens)
            elif "text" in row:
                found += windows(tokens, longest, tokenizer.bos_token_id)
        found = [row for row in found if supervised_tokens(row)]
        if not found:
            raise DataError(f"Retention.source has no row of at most {longest} tokens to measure")
        return found
