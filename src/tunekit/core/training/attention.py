"""Causal attention within one row, and within many of them in a row at once on CUDA."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 256
"""Queries that look at the keys of their window at a time, where a row is longer than it."""
HEAD_SIZE = 256
"""The largest head that the kernels of variable lengths take."""

STANDS_FOR: ContextVar[str] = ContextVar("what tensors on the meta device stand for", default="meta")
"""The type of the device whose steps are rehearsed on the meta device."""


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of each token of one row to itself and those before it; the shape and dtype of `query`.

    Args:
        query: shape (1, heads, tokens, size), the last tokens of the row, or all of them.
        key: shape (1, key heads, all tokens, size); each serves as many heads as there are heads to one of them.
        value: shape (1, key heads, all tokens, size).
        scaling: of the scores; None for 1 / sqrt(size).
        dropout: of attention weights.
        window: how many tokens a token sees, itself included; None for all.
        softcap: scores become softcap x tanh(score / softcap).
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    tokens, dtype = key.shape[2], query.dtype
    before = tokens - query.shape[2]
    if _device_type(query) == "cpu":
        # Without a matrix unit for it, half precision is three times as slow here as float32, casts included.
        query, key, value = query.float(), key.float(), value.float()
    if not before and softcap is None and (window is None or tokens <= window):
        grouped = query.shape[1] != key.shape[1]
        found = scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=grouped
        )
        return found.to(dtype)
    made = []
    for start in range(before, tokens, BLOCK):
        end = min(start + BLOCK, tokens)
        first = 0 if window is None else max(0, start - window + 1)
        places = torch.arange(first, end, device=query.device)
        distance = places[start - first :, None] - places
        seen = (distance >= 0) & (distance < (window or tokens))
        part = (query[:, :, start - before : end - before], key[:, :, first:end], value[:, :, first:end])
        made.append(_masked_attention(*part, seen, scaling, dropout, softcap))
    return torch.cat(made, dim=2).to(dtype)


def varlen() -> Callable[..., Tensor] | None:
    """Torch's kernel for rows of several lengths at once; None where this torch has none with heads in groups."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "enable_gqa" in inspect.signature(varlen_attn).parameters else None


def can_be_varlen(query: Tensor, dropout: float, softcap: float | None) -> bool:
    """Whether the kernel for rows of several lengths takes this: half precision, on a GPU that has it, and plain."""
    import torch

    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    fits = query.shape[-1] <= HEAD_SIZE and query.shape[-1] % 8 == 0
    plain = not dropout and softcap is None
    return plain and fits and torch.cuda.get_device_capability(query.device) >= (8, 0) and varlen() is not None


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    longest: int,
    longest_key: int,
    *,
    scaling: float | None = None,
    window: int | None = None,
) -> Tensor:
    """What `causal_attention` gives for each of several rows that stand end to end, by one kernel on CUDA.

    Args:
        query: shape (1, heads, tokens, size); key and value as there.
        key: see above.
        value: see above.
        starts: shape (rows + 1,), int32: where the queries of each row begin, and where the last end.
        key_starts: the same of its keys; the kernel takes the queries for the last tokens of the row, as it is there.
        longest: queries of the row with the most.
        longest_key: keys of the row with the most.
        scaling: of the scores; None for 1 / sqrt(size).
        window: how many tokens a token sees, itself included; None for all.
    """
    kernel = varlen()
    assert kernel is not None, "see `can_be_varlen`"
    # The kernel does not count the token itself; -1 is its word for all that come before, 0 for none that come after.
    sees = (-1 if window is None else window - 1, 0)
    flat = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    found = kernel(
        *flat,
        starts,
        key_starts,
        longest,
        longest_key,
        scale=scaling,
        window_size=sees,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return found.transpose(0, 1)[None]


def _masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """Attention to the keys that are `seen`, shape (queries, keys); written out where scores are capped."""
    import torch
    from torch.nn.functional import dropout as dropped
    from torch.nn.functional import scaled_dot_product_attention

    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=seen, dropout_p=dropout, scale=scaling, enable_gqa=groups > 1
        )
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~seen, -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return dropped(weights, dropout) @ value


def _device_type(tensor: Tensor) -> str:
    return STANDS_FOR.get() if tensor.is_meta else tensor.device.type
