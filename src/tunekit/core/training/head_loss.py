"""Cross-entropy from hidden states, a few tokens at a time: logits of all tokens over the vocabulary are never held.

Only ever imported from inside of methods, since it imports torch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunekit.core.model.hooks import standing_in
from tunekit.core.training.attention import device_type
from tunekit.core.training.few_shapes import filled

CHUNK_NUMBERS = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Logits held at a time by type of device: 32 MiB of them in float32, which caches hold; on a GPU 512 MiB, some 1,000
tokens of a large vocabulary: a product of fewer waits for the weight of the head, read anew for each chunk."""
CHUNK_TOKENS = 128
"""The fewest tokens in a chunk, however large the vocabulary: products of fewer are slow, on a CPU by a third."""


@contextmanager
def without_head(head: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within it, the model that `head` is the output layer of gives hidden states for logits; yields the real head."""
    with standing_in(head, _as_they_are) as real:
        yield real


@contextmanager
def without_softcap(config: Any, head: Callable[[Tensor], Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within it, the model of `config` does not cap what it takes for logits; yields `head` with the cap upon it."""
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is None:
        yield head
        return
    config.final_logit_softcapping = None
    try:
        yield lambda hidden: softcap * torch.tanh(head(hidden) / softcap)
    finally:
        config.final_logit_softcapping = softcap


def head_loss(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    weights: list[nn.Parameter],
    vocabulary: int,
    seen: Sequence[Tensor] | None = None,
) -> Tensor:
    """The summed cross-entropy of `head(hidden)` against `targets`, in float32, as a tensor to go backward from.

    Its gradient is made in the forward pass, while the logits of a chunk are there: nothing is computed twice, and
    what is kept is as large as `hidden`.

    Args:
        hidden: shape (tokens, features).
        targets: shape (tokens,), the token that each is to predict.
        head: from (tokens, features) to logits of shape (tokens, vocabulary).
        weights: the parameters of `head` that are trained.
        vocabulary: how many logits a token has.
        seen: what `head` multiplies with in the place of each of `weights`: it, rounded. None for these themselves.
    """
    size = chunk_tokens(device_type(hidden), vocabulary)
    total: Tensor = _HeadLoss.apply(hidden, targets, head, size, seen or weights, *weights)
    return total


def chunk_tokens(device: str, vocabulary: int) -> int:
    """How many tokens have logits at a time on a type of device."""
    return max(CHUNK_TOKENS, CHUNK_NUMBERS.get(device, CHUNK_NUMBERS["cpu"]) // vocabulary)


class _HeadLoss(torch.autograd.Function):  # type: ignore[misc]
    """See `head_loss`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Any, size: int, seen: Sequence[Tensor], *weights: nn.Parameter
    ) -> Tensor:
        learning = any(ctx.needs_input_grad)
        total = torch.zeros((), device=hidden.device)
        gradients = []
        if learning:  # of the weights in float32, since those of every chunk are added up
            gradients = [torch.zeros_like(hidden), *(torch.zeros_like(w, dtype=torch.float32) for w in weights)]
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            loss, found = _of_chunk(hidden[part], targets[part], head, seen, learning)
            total += loss
            if learning:
                gradients[0][part] = found[0]
                for gradient, more in zip(gradients[1:], found[1:], strict=True):
                    gradient += more
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in (hidden, *weights)]
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        scaled = (saved * gradients[0] for saved in ctx.saved_tensors)
        hidden, *weights = (tensor.to(dtype) for tensor, dtype in zip(scaled, ctx.dtypes, strict=True))
        return hidden, None, None, None, None, *weights


def _of_chunk(
    hidden: Tensor, targets: Tensor, head: Any, weights: Sequence[Tensor], learning: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """The loss of a chunk, and where `learning` the gradients of `hidden` and `weights`. Its logits are gone then."""
    with torch.set_grad_enabled(learning):
        tokens = hidden.detach().requires_grad_(learning)
        logits = head(filled(tokens))[: len(tokens)]
    loss, slope = _loss_and_slope(logits.detach(), targets)
    return loss, torch.autograd.grad(logits, [tokens, *weights], slope.to(logits.dtype)) if learning else ()


def _loss_and_slope(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy and its gradient, softmax less one at the target, in float32.

    Logits in float32 are gone afterwards: the gradient is where they were.
    """
    scores = logits.float().sub_(logits.amax(-1, keepdim=True))
    chosen = scores.gather(1, targets[:, None]).squeeze(1)
    powers = scores.exp_()
    sums = powers.sum(-1, keepdim=True)
    loss = (sums.log().squeeze(1) - chosen).sum()
    slope = powers.div_(sums)
    slope.scatter_add_(1, targets[:, None], torch.full_like(targets, -1, dtype=slope.dtype)[:, None])
    return loss, slope


def _as_they_are(hidden: Tensor) -> Tensor:
    return hidden
