"""Attention within rows is that of transformers written out, with windows, soft caps and heads in groups."""

from itertools import accumulate

import pytest
import torch

from tunekit.core.training import attention
from tunekit.core.training.attention import causal_attention, varlen_attention

KINDS = {
    "plain": {},
    "window": {"window": 3},
    "softcap": {"softcap": 1.5},
    "both": {"window": 5, "softcap": 1.5, "scaling": 0.7},
}


def tensors(tokens, dtype=torch.float32, device="cpu", size=8):
    torch.manual_seed(0)
    shapes = ((1, 4, tokens, size), (1, 2, tokens, size), (1, 2, tokens, size))
    return [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]


def written_out(query, key, value, scaling=None, window=None, softcap=None):
    """One head and one token at a time, as the formula says."""
    rows = []
    for head in range(query.shape[1]):
        keys, values = key[0, head // 2], value[0, head // 2]
        for at in range(query.shape[2]):
            first = 0 if window is None else max(0, at - window + 1)
            scores = keys[first : at + 1] @ query[0, head, at] * (scaling or query.shape[-1] ** -0.5)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            rows.append(torch.softmax(scores, 0) @ values[first : at + 1])
    return torch.stack(rows).view(query.shape)


def with_gradients(function, inputs):
    out = function(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    return [out, *torch.autograd.grad((out.float() * weights).sum(), inputs)]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_it_is_the_formula_and_so_is_its_gradient(kind, tokens, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 4)
    inputs = tensors(tokens)
    expected = with_gradients(lambda *three: written_out(*three, **kind), inputs)
    found = with_gradients(lambda *three: causal_attention(*three, **kind), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_on_the_cpu_half_precision_is_rounded_once():
    inputs = tensors(9, torch.bfloat16)
    wide = [tensor.float() for tensor in inputs]
    assert torch.equal(causal_attention(*inputs), causal_attention(*wide).bfloat16())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_last_tokens_alone_look_back_as_they_do_among_all(kind, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 4)
    inputs = tensors(11)
    expected = with_gradients(lambda *three: written_out(*three, **kind)[:, :, 5:], inputs)
    found = with_gradients(lambda query, *rest: causal_attention(query[:, :, 5:], *rest, **kind), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_of_cuda_is_each_row_alone(window):
    lengths = [5, 1, 9]
    inputs = tensors(sum(lengths), torch.bfloat16, "cuda", size=64)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    assert attention.can_be_varlen(inputs[0], 0.0, None)

    def alone(*three):
        parts = zip(*(tensor.float().split(lengths, dim=2) for tensor in three), strict=True)
        return torch.cat([causal_attention(*part, window=window) for part in parts], dim=2)

    found = with_gradients(lambda *three: varlen_attention(*three, starts, starts, 9, 9, window=window), inputs)
    for one, other in zip(found, with_gradients(alone, inputs), strict=True):
        assert ((one.float() - other.float()).norm() / other.float().norm()).item() < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_of_cuda_takes_queries_for_the_last_tokens_of_their_row(window):
    queries, keys = [5, 1, 3], [5, 6, 8]  # a prefix of 5 tokens, and two remainders that see it
    query = tensors(sum(queries), torch.bfloat16, "cuda", size=64)[0]
    _, key, value = tensors(sum(keys), torch.bfloat16, "cuda", size=64)
    starts, key_starts = (
        torch.tensor([0, *accumulate(each)], dtype=torch.int32, device="cuda") for each in (queries, keys)
    )

    def alone(query, key, value):
        parts = zip(
            query.float().split(queries, 2), key.float().split(keys, 2), value.float().split(keys, 2), strict=True
        )
        return torch.cat([causal_attention(*part, window=window) for part in parts], dim=2)

    inputs = [query, key, value]
    found = with_gradients(lambda *three: varlen_attention(*three, starts, key_starts, 5, 8, window=window), inputs)
    for one, other in zip(found, with_gradients(alone, inputs), strict=True):
        assert ((one.float() - other.float()).norm() / other.float().norm()).item() < 1e-2
