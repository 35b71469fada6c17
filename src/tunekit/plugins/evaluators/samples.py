"""Samples: what the model answers to a few fixed prompts, to be looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.data.codec import Codec
from tunekit.core.evaluation.predicting import generate
from tunekit.core.fields import as_tuple, at_least
from tunekit.core.interfaces import Encoded, Evaluator
from tunekit.core.outcomes import Measured
from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def _are_prompts(instance: Any, attribute: Any, value: Any) -> None:
    if not value or not all(value):
        raise ConfigError(f"must be one prompt at least, and none empty, got {value!r}", "Samples.prompts")


@attrs.frozen(kw_only=True)
class Samples(Evaluator):
    """Greedy answers to fixed prompts, at each evaluation of a run; it has no metric.

    They are kept in `evaluations/` of the run: `run.evaluations["tuned"]["details"]["samples"]["answers"]` is a list of
    `{"prompt": ..., "answer": ...}` in the order of the prompts.

    Args:
        prompts: what is asked, each as one message of the user, through the template of the run.
        continued: the prompts are beginnings of plain texts instead, which the model goes on with.
        max_new_tokens: an answer is cut after so many tokens.
    """

    name = "samples"
    reads_rows = False
    better: ClassVar[Mapping[str, Literal["min", "max"]]] = {}

    prompts: tuple[str, ...] = attrs.field(converter=as_tuple, validator=_are_prompts)
    continued: bool = False
    max_new_tokens: int = attrs.field(default=64, validator=at_least(1))

    def check_data(self, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context) -> None:
        """DataError if the template refuses a prompt; the held-out rows do not matter."""
        self._tokens(Codec(tokenizer, context.template))

    def evaluate(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context
    ) -> Mapping[str, float]:
        """The answers, as details."""
        codec = Codec(tokenizer, context.template)
        found = map(codec.decode, generate(model, tokenizer, self._tokens(codec), self.max_new_tokens))
        answers = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(self.prompts, found, strict=True)]
        return Measured({}, details={"answers": answers})

    def _tokens(self, codec: Codec) -> list[list[int]]:
        if self.continued:  # a text of its own, without the token that ends it
            return [codec.encode({"text": prompt})["input_ids"][:-1] for prompt in self.prompts]
        return [codec.prompt(prompt) for prompt in self.prompts]
