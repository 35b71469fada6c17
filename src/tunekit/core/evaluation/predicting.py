"""What evaluators stand on: a model left as it was found, likelihoods from logits, and batched greedy generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from tunekit.core.data.batching import collate, lengths, on_device, shortest_and_longest
from tunekit.core.data.codec import IGNORED
from tunekit.core.evaluation import together
from tunekit.core.evaluation.logits import logits_at
from tunekit.core.interfaces import Encoded
from tunekit.core.model.masters import rounded

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 4096
"""Padded tokens in one forward pass of an evaluation; a matter of memory, not of the result."""
LOGITS = 1 << 25
"""Logits that are looked at at a time, 128 MiB of them in float32."""


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


@contextmanager
def trying(model: nn.Module) -> Iterator[None]:
    """Within it, `model` can be trained without dropping anything; afterwards parameters and dropout are as before."""
    import torch

    kept = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    try:
        with dropping_nothing(model):
            yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])


@contextmanager
def dropping_nothing(model: nn.Module) -> Iterator[None]:
    """Within it, `model` drops nothing at random, in training mode either; afterwards it does as before."""
    found = [(m, name, rate) for m in model.modules() for name, rate in vars(m).items() if _drops(m, name)]
    try:
        for module, name, rate in found:
            setattr(module, name, _nothing(rate))
        yield
    finally:
        for module, name, rate in found:
            setattr(module, name, rate)


def _nothing(rate: Any) -> Any:
    """No dropout in the place of such a rate; PEFT's methods have one for each adapter, by its name."""
    if isinstance(rate, dict):
        return {name: _nothing(one) for name, one in rate.items()}
    return 0.0 if isinstance(rate, float) else rate


def drops(modules: Iterable[nn.Module]) -> bool:
    """Whether anything is dropped at random in one of `modules` while it is trained."""
    rates = [value for m in modules for name, value in vars(m).items() if _drops(m, name)]
    each = [one for rate in rates for one in (rate.values() if isinstance(rate, dict) else [rate])]
    return any(isinstance(rate, float) and rate > 0 for rate in each)


def _drops(module: nn.Module, name: str) -> bool:
    return "dropout" in name or (name == "p" and "Dropout" in type(module).__name__)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up short rows: the pad token, else the end token; it is masked, so its value never matters."""
    found = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if found is None else found)


def predictions(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits (tokens, vocabulary) that predict a supervised token, in float32, and these (tokens,), some at a time.

    Call it inside `evaluating(model)`. The loss that a model reports is never used: some methods add terms to it.
    """
    for _, logits, labels in row_predictions(model, tokenizer, rows):
        yield logits, labels


def row_predictions(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What `predictions` yields, and before it the number of each token's row in `rows`, shape (tokens,)."""
    import torch

    device, fill = str(next(model.parameters()).device), pad_id(tokenizer)
    shown = shortest_and_longest(rows) if len(rows) > 1 else []
    how = together.read(model, fill, [row["input_ids"] for row in shown])
    for group in together.groups(how, lengths(rows), BATCH_TOKENS):
        batch = collate([rows[at] for at in group], fill, device)
        width = batch.pop("labels").shape[1]
        supervised = [
            (number, row * width + at, label)
            for row, number in enumerate(group)
            for at, label in enumerate(rows[number]["labels"][1:])
            if label != IGNORED
        ]
        logits = logits_at(model, batch, [place for _, place, _ in supervised])
        numbers = on_device([number for number, _, _ in supervised], device, torch.long)
        labels = on_device([label for _, _, label in supervised], device, torch.long)
        size = max(1, LOGITS // logits.shape[-1])
        for some in zip(numbers.split(size), logits.split(size), labels.split(size), strict=True):
            yield some[0], some[1].float(), some[2]


def row_losses(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded]
) -> tuple[list[float], list[int]]:
    """The negative log-likelihood of each row's supervised tokens in nats, summed, and how many these are."""
    import torch
    from torch.nn.functional import cross_entropy

    found = []
    with evaluating(model):
        for numbers, logits, labels in row_predictions(model, tokenizer, rows):
            found.append((numbers, cross_entropy(logits, labels, reduction="none")))
    nats = torch.zeros(len(rows), dtype=torch.float64)
    tokens = torch.zeros(len(rows), dtype=torch.long)
    if found:  # added up on the CPU: on a GPU, sums of this kind come in no fixed order
        at, losses = (torch.cat(each).cpu() for each in zip(*found, strict=True))
        nats.index_add_(0, at, losses.double())
        tokens.index_add_(0, at, torch.ones_like(at))
    return nats.tolist(), tokens.tolist()


def text_bytes(tokenizer: PreTrainedTokenizerBase, row: Encoded) -> int:
    """Bytes in UTF-8 of the text of a row's supervised tokens; special tokens, as an end token, have none."""
    ids, labels = list(row["input_ids"]), [IGNORED, *row["labels"][1:]]  # nothing predicts the first token
    borders = [at for at in range(1, len(ids)) if (labels[at] == IGNORED) != (labels[at - 1] == IGNORED)]

    def before(end: int) -> int:
        text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # A character that the border cuts in two is decoded as U+FFFD, and counts where it ends.
        return len(text.rstrip("\ufffd").encode(errors="replace"))

    # With what stands before: on its own, some tokenizers decode a text without the blank it begins with.
    ends = [*borders, len(ids)] if len(borders) % 2 else borders
    return sum(before(end) - before(start) for start, end in zip(ends[::2], ends[1::2], strict=True))


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    change_logits: Callable[[Sequence[int]], Callable[[Tensor, Tensor], Tensor]] | None = None,
) -> list[list[int]]:
    """Greedy continuations of token prompts, in order, each cut before its first stop token.

    Prompts go through the model together where that gives the same tokens as one at a time, but for rounding. Stop
    tokens are those of the model's generation configuration, which tunekit completes when it loads a model.
    `change_logits` is told the numbers of the prompts that go through the model together, and gives what is applied to
    their tokens so far and the logits of the next ones, shape (prompts, vocabulary).
    """
    fill, stops = pad_id(tokenizer), stop_ids(model)
    answers: dict[int, list[int]] = {}
    with evaluating(model), rounded(model):
        how = together.answered(model, prompts, max_new_tokens, stops, partial(_continued, model, fill))
        for group in together.groups(how, [len(prompt) + max_new_tokens for prompt in prompts], BATCH_TOKENS):
            change = change_logits(group) if change_logits else None
            found = _continued(model, fill, [prompts[at] for at in group], max_new_tokens, change)
            answers |= {at: _until_stop(row, stops) for at, row in zip(group, found, strict=True)}
    return [answers[at] for at in range(len(prompts))]


def _continued(
    model: nn.Module,
    fill: int,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    change_logits: Callable[[Tensor, Tensor], Tensor] | None,
) -> list[list[int]]:
    """What follows each of `prompts`, in one batch, padded on the left with `fill`."""
    import torch

    device, width = next(model.parameters()).device, max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    out = model.generate(
        input_ids=torch.tensor(
            [[fill] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)], device=device
        ),
        attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding], device=device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=[change_logits] if change_logits else None,
        pad_token_id=fill,
    )
    found: list[list[int]] = out[:, width:].tolist()
    return found


def stop_ids(model: nn.Module) -> frozenset[int]:
    """The stop tokens in the model's generation configuration."""
    found = model.generation_config.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or [])


def _until_stop(ids: Sequence[int], stops: frozenset[int]) -> list[int]:
    end = next((at for at, token in enumerate(ids) if token in stops), len(ids))
    return list(ids[:end])
