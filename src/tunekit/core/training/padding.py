"""Attention of padded rows on CUDA: as transformers', without the wait in which it looks whether anything is padded.

What it looks at is a mask that lies on the GPU, and the answer settles which kernel is taken. Whoever made the mask
knows it already. Only the mask is made here; what attends with it is what attends otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from tunekit.core.training.segments import attending

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ATTENTION = "tunekit_padded"
"""The name under which transformers knows it."""
USUAL = "sdpa"
"""The attention that it stands for."""

_padded: ContextVar[bool | None] = ContextVar("whether any row of this pass is padded; None: unknown", default=None)


def unwatched(model: nn.Module, device: str) -> AbstractContextManager[None]:
    """Within it, `model` does not look at masks on CUDA where it is told what is in them; otherwise it is as it was."""
    usual = getattr(model.config, "_attn_implementation", "")
    if not device.startswith("cuda") or usual != USUAL or not model._can_set_attn_implementation():
        return nullcontext()
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(ATTENTION, mask)
    return attending(model, ATTENTION)


@contextmanager
def told(padded: bool) -> Iterator[None]:
    """Within it, a pass goes through the model in which rows are `padded`, or none is."""
    before = _padded.set(padded)
    try:
        yield
    finally:
        _padded.reset(before)


def mask(
    *,
    attention_mask: Tensor | None,
    allow_is_causal_skip: bool = True,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor | None:
    """The mask that transformers makes, or None where there is none to be made; it asks for this by name.

    Args:
        attention_mask: shape (rows, tokens), True for tokens that are no padding.
        allow_is_causal_skip: whether there need not be one where attention is plainly causal.
        dtype: of what attends.
        options: see `transformers.masking_utils.sdpa_mask`.
    """
    from transformers.masking_utils import sdpa_mask

    padded = _padded.get()
    if padded is False:
        attention_mask = None
        # Without a mask, heads would be left in groups, and the kernel that takes them in float32 keeps the scores.
        allow_is_causal_skip = allow_is_causal_skip and (dtype is None or dtype.itemsize == 2)
    elif padded:
        allow_is_causal_skip = False
    found: Tensor | None = sdpa_mask(
        attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, dtype=dtype, **options
    )
    return found
