"""Rows laid end to end in one sequence without padding, each attending to itself alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tunekit.core.interfaces import Encoded
from tunekit.errors import NotSupported

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ATTENTION = "tunekit_segments"
"""The name under which transformers knows `attend`."""


def flatten(rows: Sequence[Encoded], device: str) -> dict[str, Any]:
    """Model inputs of `rows` as one sequence: `input_ids` and `position_ids` of shape (1, tokens), `segment_lengths`.

    The positions of each row begin at 0, as they do when it is alone.
    """
    import torch

    lengths = [len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]], device=device),
        "position_ids": torch.cat([torch.arange(length, device=device) for length in lengths])[None],
        "segment_lengths": lengths,
    }


@contextmanager
def attending(model: PreTrainedModel, how: str) -> Iterator[None]:
    """Within it, `model` attends by the implementation of this name; afterwards as before.

    Raises NotSupported for a model whose attention cannot be chosen.
    """
    from transformers import AttentionInterface

    if not model._can_set_attn_implementation():
        raise NotSupported(f"the attention of {type(model).__name__} cannot be chosen")
    AttentionInterface.register(ATTENTION, attend)
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
    segment_lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of every segment to itself; transformers calls it in the place of its own.

    Args:
        module: the attention layer.
        query: shape (1, heads, tokens, size).
        key: shape (1, key heads, tokens, size).
        value: shape (1, key heads, tokens, size).
        attention_mask: not looked at; the segments say everything.
        dropout: of attention weights.
        scaling: of the scores; None for 1 / sqrt(size).
        segment_lengths: tokens of each row.
        sliding_window: tokens that a layer looks back; longer rows are refused.
        is_causal: False in a layer that looks ahead, which is refused.
        options: whatever else a model asks of its attention; what would change the result is refused.

    Raises:
        NotSupported: the layer attends in a way that this function does not know.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if segment_lengths is None:
        raise NotSupported("the model does not hand on to its attention where rows begin")
    if sliding_window is not None and max(segment_lengths) > sliding_window:
        raise NotSupported(f"a row is longer than the sliding window of {sliding_window} tokens")
    asked = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if asked or is_causal is False or not getattr(module, "is_causal", True):
        raise NotSupported(f"its attention is not plainly causal: {', '.join(asked) or 'it looks ahead'}")
    parts = [tensor.split(list(segment_lengths), dim=2) for tensor in (query, key, value)]
    found = [
        scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(found, dim=2).transpose(1, 2), None
