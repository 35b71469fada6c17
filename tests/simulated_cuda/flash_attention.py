"""What the CPU has no kernel for: flash attention over rows of several lengths, in float32, with the checks of CUDA's."""

import warnings
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from simulated_cuda.device import uncounted

LIBRARY = torch.library.Library("aten", "IMPL")  # what is registered lives as long as it does
Span = tuple[int, int]


def register() -> None:
    """Put both passes behind torch's own operators."""
    for name, function in (("_flash_attention_forward", _forward), ("_flash_attention_backward", _backward)):
        try:
            LIBRARY.impl(name, function, "CUDA")
        except RuntimeError as error:
            warnings.warn(f"the simulated device has no {name}: {error}", stacklevel=2)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if not (query.dtype == key.dtype == value.dtype):
        raise RuntimeError("query, key and value must have the same dtype")
    if query.shape[-1] > 256 or query.shape[-1] % 8:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256, a multiple of 8")
    if query.shape[-2] % key.shape[-2]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    if any(tensor.stride(-1) != 1 for tensor in (query, key, value)):
        raise RuntimeError("Input tensor must have contiguous last dimension")


def _spans(starts: Tensor) -> list[Span]:
    """From where to where each row is."""
    if starts.dtype != torch.int32:
        raise RuntimeError("cu_seqlens must have dtype int32")
    with uncounted():
        found = starts.tolist()
    return list(pairwise(found))


def _rows(starts_q: Tensor, starts_k: Tensor) -> list[tuple[Span, Span]]:
    return list(zip(_spans(starts_q), _spans(starts_k), strict=True))


def _check_rows(rows: list[tuple[Span, Span]], tokens: tuple[int, int], most: tuple[int, int]) -> None:
    for side in (0, 1):
        if max(row[side][1] - row[side][0] for row in rows) > most[side]:
            raise RuntimeError("a row is longer than max_q or max_k says: the kernel would not see all of it")
        if rows[-1][side][1] != tokens[side]:
            raise RuntimeError("the rows do not end where the tensors do: the kernel would leave numbers unwritten")


def _one(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, left: int | None, right: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One row, in float32 on the CPU, (heads, queries, size) and (key heads, keys, size).

    Returns the result, the logsumexp of the scores, the weights, and keys and values with their heads repeated.
    """
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = query @ key.transpose(1, 2) * scale
    queries, keys = query.shape[1], key.shape[1]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]
    if causal:
        right = 0
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left is not None and left >= 0:
        seen &= distance <= left
    if right is not None and right >= 0:
        seen &= -distance <= right
    scores = scores.masked_fill(~seen, float("-inf"))
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return weights @ value, scores.logsumexp(-1), weights, key, value


def _forward(
    query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int,
    max_k: int, dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None, **rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check(query, key, value)
    if dropout_p:
        raise NotImplementedError("the simulated flash attention has no dropout")
    given = (is_causal, query.shape[-1] ** -0.5 if scale is None else scale, window_size_left, window_size_right)
    q, k, v = (_down(tensor) for tensor in (query, key, value))
    if cum_seq_q is None or cum_seq_k is None:  # (rows, tokens, heads, size)
        made = [_one(*(each.transpose(0, 1) for each in row), *given) for row in zip(q, k, v, strict=True)]
        out = torch.stack([each[0].transpose(0, 1) for each in made])
        sums = torch.stack([each[1] for each in made])
    else:
        rows = _rows(cum_seq_q, cum_seq_k)
        _check_rows(rows, (len(q), len(k)), (max_q, max_k))
        made = [
            _one(q[a:b].transpose(0, 1), k[c:d].transpose(0, 1), v[c:d].transpose(0, 1), *given)
            for (a, b), (c, d) in rows
        ]
        out = torch.cat([each[0].transpose(0, 1) for each in made])
        sums = torch.cat([each[1] for each in made], -1)
    device = query.device
    random_state, offset = (torch.zeros(shape, dtype=torch.uint64, device=device) for shape in ((2,), ()))
    debug_mask = torch.empty(0, dtype=query.dtype, device=device)
    return _up(out.to(query.dtype), device), _up(sums, device), random_state, offset, debug_mask


def _backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
    cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
    rng_state: Tensor, unused: Tensor, *, scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None, **rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, slope = (_down(tensor) for tensor in (query, key, value, grad_out))
    found = [torch.zeros_like(each) for each in (q, k, v)]

    def slopes(*row: Tensor) -> list[Tensor]:
        a, b, c, up = (each.transpose(0, 1) for each in row)
        _, _, weights, keys, values = _one(a, b, c, is_causal, scale, window_size_left, window_size_right)
        of_weights = up @ values.transpose(1, 2)
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
        heads, groups = b.shape[0], a.shape[0] // b.shape[0]
        of_key = (of_scores.transpose(1, 2) @ a).view(heads, groups, *b.shape[1:]).sum(1)
        of_value = (weights.transpose(1, 2) @ up).view(heads, groups, *c.shape[1:]).sum(1)
        return [each.transpose(0, 1) for each in (of_scores @ keys, of_key, of_value)]

    if cum_seq_q is None or cum_seq_k is None:
        for at in range(len(q)):
            for into, of_row in zip(found, slopes(q[at], k[at], v[at], slope[at]), strict=True):
                into[at] = of_row
    else:
        for (a, b), (c, d) in _rows(cum_seq_q, cum_seq_k):
            found[0][a:b], found[1][c:d], found[2][c:d] = slopes(q[a:b], k[c:d], v[c:d], slope[a:b])
    return tuple(_up(each.to(query.dtype), query.device) for each in found)


def _down(tensor: Tensor) -> Tensor:
    """What a kernel of the device reads where it lies."""
    with uncounted():
        return tensor.detach().cpu().float()


def _up(tensor: Tensor, device: torch.device) -> Tensor:
    with uncounted():
        return tensor.to(device)
