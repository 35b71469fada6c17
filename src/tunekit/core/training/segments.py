"""Rows laid end to end in one sequence without padding, each attending to itself alone, or to its prefix as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.data.batching import on_device
from tunekit.core.training.attention import can_be_varlen, causal_attention, varlen_attention, without_graphs
from tunekit.core.training.prefixes import Layout
from tunekit.errors import NotSupported

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ATTENTION = "tunekit_segments"
"""The name under which transformers knows `attend`."""


@attrs.frozen(kw_only=True, eq=False)
class Segments:
    """Where segments begin and end in a sequence; an object of its own, into which torch.compile does not look.

    Args:
        lengths: tokens of each segment: a row, a prefix of several rows, or the remainder of a row.
        starts: shape (segments + 1,), int32, on the device: where each segment begins, and where the last ends.
        after: for a remainder, by its number, the number of the segment that is its prefix, to which it attends too.
        seen_starts: `starts` of what they attend to, each remainder with its prefix before it.
    """

    lengths: Sequence[int]
    starts: Tensor
    after: Mapping[int, int] = attrs.field(factory=dict)
    seen_starts: Tensor = attrs.field(default=attrs.Factory(lambda self: self.starts, takes_self=True))

    def seen(self, tensor: Tensor) -> list[Tensor]:
        """Keys or values that each segment attends to; `tensor` has those of all, shape (1, heads, tokens, size)."""
        import torch

        # No gather: on CUDA its gradient would be added up in an order of its own each time.
        own = tensor.split(list(self.lengths), dim=2)
        return [
            torch.cat([own[self.after[at]], part], dim=2) if at in self.after else part for at, part in enumerate(own)
        ]

    def all_seen(self, tensor: Tensor) -> Tensor:
        """What `seen` gives, end to end."""
        import torch

        own = tensor.split(list(self.lengths), dim=2)
        numbers = [number for at in range(len(own)) for number in ([self.after[at]] if at in self.after else []) + [at]]
        return torch.cat([own[number] for number in numbers], dim=2) if self.after else tensor

    @property
    def seen_lengths(self) -> list[int]:
        """Tokens that each segment attends to."""
        return _seen_lengths(self.lengths, self.after)


def flatten(layout: Layout, device: str) -> dict[str, Any]:
    """Model inputs of the rows of `layout`: `input_ids` and `position_ids` of shape (1, tokens), and `segments`.

    The positions of each row begin at 0, as they do when it is alone.
    """
    import torch

    lengths = (layout.lengths, _seen_lengths(layout.lengths, layout.after))
    starts, seen_starts = (on_device([0, *accumulate(each)], device, torch.int32) for each in lengths)
    return {
        "input_ids": on_device([layout.tokens], device),
        "position_ids": on_device([layout.positions], device),
        "segments": Segments(lengths=layout.lengths, starts=starts, after=layout.after, seen_starts=seen_starts),
    }


def _seen_lengths(lengths: Sequence[int], after: Mapping[int, int]) -> list[int]:
    return [own + (lengths[after[at]] if at in after else 0) for at, own in enumerate(lengths)]


@contextmanager
def attending(model: PreTrainedModel, how: str, compiled: bool = False) -> Iterator[None]:
    """Within it, `model` attends by the implementation of this name; afterwards as before.

    Where its layers are `compiled`, `attend` is not: its rows are never the same, and every batch would be compiled.

    Raises NotSupported for a model whose attention cannot be chosen.
    """
    import torch
    from transformers import AttentionInterface

    if not model._can_set_attn_implementation():
        raise NotSupported(f"the attention of {type(model).__name__} cannot be chosen")
    AttentionInterface.register(ATTENTION, torch.compiler.disable(attend) if compiled else attend)
    before = model.config._attn_implementation
    model.set_attn_implementation(how)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of every segment to itself and its prefix; transformers calls it in the place of its own.

    Args:
        module: the attention layer.
        query: shape (1, heads, tokens, size).
        key: shape (1, key heads, tokens, size).
        value: shape (1, key heads, tokens, size).
        attention_mask: not looked at; the segments say everything.
        dropout: of attention weights.
        scaling: of the scores; None for 1 / sqrt(size).
        segments: where rows begin and end.
        sliding_window: tokens that a token of this layer sees, itself included; None for all before it.
        softcap: what tanh holds the scores of this layer below.
        is_causal: False in a layer that looks ahead, which is refused.
        options: whatever else a model asks of its attention; what would change the result is refused.

    Raises:
        NotSupported: the layer attends in a way that this function does not know.
    """
    import torch

    if segments is None:
        raise NotSupported("the model does not hand on to its attention where rows begin")
    asked = [name for name in ("s_aux", "position_bias") if options.get(name) is not None]
    if asked or is_causal is False or not getattr(module, "is_causal", True):
        raise NotSupported(f"its attention is not plainly causal: {', '.join(asked) or 'it looks ahead'}")
    if can_be_varlen(query, dropout, softcap, sliding_window, scaling):
        found = varlen_attention(
            query,
            segments.all_seen(key),
            segments.all_seen(value),
            segments.starts,
            segments.seen_starts,
            max(segments.lengths),
            max(segments.seen_lengths),
            scaling=scaling,
            window=sliding_window,
        )
        return found.transpose(1, 2), None
    parts = (query.split(list(segments.lengths), dim=2), segments.seen(key), segments.seen(value))
    options = {"scaling": scaling, "dropout": dropout, "window": sliding_window, "softcap": softcap}
    with without_graphs(query):
        each = [causal_attention(*part, **options) for part in zip(*parts, strict=True)]
    return torch.cat(each, dim=2).transpose(1, 2), None
