"""What evaluators stand on: a model left as it was found, likelihoods from logits, and batched greedy generation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tunekit.core.batching import chunks, collate, lengths
from tunekit.core.codec import IGNORED
from tunekit.core.component import Context
from tunekit.core.interfaces import Encoded, Evaluator
from tunekit.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 4096
"""Padded tokens in one forward pass of an evaluation; a matter of memory, not of the result."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    import torch

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def check_names(evaluators: Iterable[Evaluator]) -> None:
    """Raise ConfigError if two evaluators return a metric of the same name."""
    names = [name for evaluator in evaluators for name in evaluator.better]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(f"two evaluators return {sorted(twice)[0]!r}", "Pipeline.evaluators")


def measure(
    evaluators: Iterable[Evaluator],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    context: Context,
) -> dict[str, float]:
    """All metrics of all evaluators on `rows`; none without rows. TrainingError for one that is not finite."""
    metrics: dict[str, float] = {}
    if rows:
        with evaluating(model):
            for evaluator in evaluators:
                metrics |= evaluator.evaluate(model, tokenizer, rows, context)
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainingError(f"{name} on the validation rows is {value}: the model's output is broken")
    return metrics


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up short rows: the pad token, else the end token; it is masked, so its value never matters."""
    found = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if found is None else found)


def predictions(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded]
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each batch, the logits (tokens, vocabulary) that predict a supervised token, in float32, and these (tokens,).

    Call it inside `evaluating(model)`. The loss that a model reports is never used: some methods add terms to it.
    """
    device = str(next(model.parameters()).device)
    for group in chunks(lengths(rows), BATCH_TOKENS):
        batch = collate([rows[at] for at in group], pad_id(tokenizer), device)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        supervised = labels != IGNORED
        yield logits[supervised].float(), labels[supervised]


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    """Greedy continuations of token prompts, in order, each cut before its first stop token.

    Prompts are padded on the left, which gives the same tokens as one prompt at a time. Stop tokens are those of the
    model's generation configuration, which tunekit completes when it loads a model.
    """
    import torch

    device, fill, stops = next(model.parameters()).device, pad_id(tokenizer), stop_ids(model)
    answers: dict[int, list[int]] = {}
    with evaluating(model):
        for group in chunks([len(prompt) + max_new_tokens for prompt in prompts], BATCH_TOKENS):
            width = len(prompts[group[0]])
            padding = [width - len(prompts[at]) for at in group]
            ids = [[fill] * pad + list(prompts[at]) for at, pad in zip(group, padding, strict=True)]
            mask = [[0] * pad + [1] * (width - pad) for pad in padding]
            out = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=fill,
            )
            answers |= {at: _until_stop(row, stops) for at, row in zip(group, out[:, width:].tolist(), strict=True)}
    return [answers[at] for at in range(len(prompts))]


def stop_ids(model: nn.Module) -> frozenset[int]:
    """The stop tokens in the model's generation configuration."""
    found = model.generation_config.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or [])


def _until_stop(ids: Sequence[int], stops: frozenset[int]) -> list[int]:
    end = next((at for at, token in enumerate(ids) if token in stops), len(ids))
    return list(ids[:end])
