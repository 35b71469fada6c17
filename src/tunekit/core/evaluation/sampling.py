"""Sampled answers: the same ones for the same seed and device, whatever goes through the model together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunekit.core.evaluation.predicting import generate

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase


def sample(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    count: int,
    temperature: float,
    seed: int,
) -> list[list[list[int]]]:
    """For each prompt, in order, `count` continuations drawn from the model, each cut before its first stop token.

    The most likely token after Gumbel noise was added to the logits is a draw from their softmax (Maddison et al.,
    https://arxiv.org/abs/1411.0030). The noise of each answer comes from a generator of its own, so that neither the
    order nor the grouping of prompts changes an answer, and no other random state moves. A GPU draws other numbers from
    a seed than the CPU does.

    Args:
        model: in any mode; it is left as it is.
        tokenizer: the model's.
        prompts: as tokens.
        max_new_tokens: an answer is cut after so many tokens.
        count: answers to each prompt.
        temperature: what the logits are divided by; 0 takes the likeliest token, and all answers are the same.
        seed: of the draws.
    """
    if not temperature:
        return [[answer] * count for answer in generate(model, tokenizer, prompts, max_new_tokens)]
    asked = [(prompt, number) for prompt in prompts for number in range(count)]
    seeds = [_seed(seed, prompt, number) for prompt, number in asked]
    found = generate(
        model,
        tokenizer,
        [prompt for prompt, _ in asked],
        max_new_tokens,
        change_logits=lambda group: _Noise([seeds[at] for at in group], temperature),
    )
    return [found[at : at + count] for at in range(0, len(found), count)]


class _Noise:
    """Adds to logits of shape (rows, vocabulary) what makes the greatest a draw; a logits processor of transformers."""

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self._temperature = temperature
        self._seeds = seeds
        self._generators: list[torch.Generator] = []

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        import torch

        if not self._generators:  # where the logits are: numbers drawn on the CPU would take longer than the model
            self._generators = [torch.Generator(logits.device).manual_seed(seed) for seed in self._seeds]
        drawn = torch.empty_like(logits, dtype=torch.float32)
        for row, generator in zip(drawn, self._generators, strict=True):
            row.exponential_(generator=generator)
        return logits.float() / self._temperature - drawn.log_()


def _seed(seed: int, prompt: Sequence[int], number: int) -> int:
    content = f"{seed} {number} {list(prompt)}".encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
