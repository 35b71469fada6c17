"""Causal attention within one row, and within many of them in a row at once on CUDA."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 256
"""Queries that look at the keys of their window at a time, where a row is longer than it."""
HEAD_SIZE = 256
"""The largest head that flash attention takes."""

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

    tokens, dtype, device = key.shape[2], query.dtype, device_type(query)
    before = tokens - query.shape[2]
    plain = not before and softcap is None and (window is None or tokens <= window)
    if device == "cpu":
        # Without a matrix unit for it, half precision is three times as slow here as float32, casts included.
        query, key, value = query.float(), key.float(), value.float()
    if device == "cuda" and not takes_groups(query, masked=not plain):
        key, value = repeated(key, query), repeated(value, query)
    if plain:
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


def takes_groups(query: Tensor, *, masked: bool) -> bool:
    """Whether a kernel of CUDA takes heads in groups, which flash attention alone does: else the scores are kept."""
    return not masked and query.dtype.itemsize == 2 and query.shape[-1] <= HEAD_SIZE


def repeated(tensor: Tensor, query: Tensor) -> Tensor:
    """Keys or values, shape (1, key heads, tokens, size), once for each head of `query`."""
    groups = query.shape[1] // tensor.shape[1]
    return tensor.repeat_interleave(groups, dim=1) if groups > 1 else tensor


def without_graphs(query: Tensor) -> AbstractContextManager[Any]:
    """Within it, torch does not take cuDNN's attention, which builds a graph for each new length of a row."""
    if query.device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    found: AbstractContextManager[Any] = sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    return found


@cache
def varlen() -> tuple[Callable[..., Tensor] | None, Collection[str]]:
    """Torch's kernel for rows of several lengths at once, if this torch has it, and the names of its parameters.

    All take heads in groups; 2.10 knows no window and no scale, and from 2.12 on they want to be told of the groups.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, ()
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def can_be_varlen(
    query: Tensor, dropout: float, softcap: float | None, window: int | None = None, scaling: float | None = None
) -> bool:
    """Whether the kernel for rows of several lengths takes this: half precision, on a GPU that has it, and plain."""
    import torch

    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    size = query.shape[-1]
    plain = not dropout and softcap is None and size <= HEAD_SIZE and size % 8 == 0
    return plain and torch.cuda.get_device_capability(query.device) >= (8, 0) and knows_varlen(size, window, scaling)


def knows_varlen(size: int, window: int | None, scaling: float | None) -> bool:
    """Whether the kernel of this torch knows such a window, and such a scale of the scores of heads of this size."""
    kernel, known = varlen()
    windowed = window is None or "window_size" in known
    return kernel is not None and windowed and (scaling in (None, size**-0.5) or "scale" in known)


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
    kernel, known = varlen()
    assert kernel is not None, "see `can_be_varlen`"
    options = {
        "is_causal": True,
        # The kernel does not count the token itself; -1 is its word for all before it, 0 for none after it.
        "window_size": (-1 if window is None else window - 1, 0),
        "scale": scaling,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    flat = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    said = {name: value for name, value in options.items() if name in known}
    found = kernel(*flat, starts, key_starts, longest, longest_key, **said)
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

    if softcap is None:
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, attn_mask=seen, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        )
    key, value = repeated(key, query), repeated(value, query)
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~seen, -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return dropped(weights, dropout) @ value


def device_type(tensor: Tensor) -> str:
    """The type of the device that computes with `tensor`, or would, where a step is rehearsed."""
    return STANDS_FOR.get() if tensor.is_meta else tensor.device.type
