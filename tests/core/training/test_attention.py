"""Attention within rows is that of transformers written out, with windows, soft caps and heads in groups."""

from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.attention.varlen as varlen_module
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from tunekit.core.memory.live_bytes import LiveBytes
from tunekit.core.memory.weightless import AsOnDevice
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


class Asked(TorchFunctionMode):
    """Within it, whether fused attention is asked to take heads in groups."""

    def __init__(self):
        super().__init__()
        self.groups = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is scaled_dot_product_attention:
            self.groups.append(kwargs["enable_gqa"])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_cuda_heads_in_groups_are_left_to_flash_attention_alone(kind, dtype, monkeypatch):
    monkeypatch.setattr(attention, "device_type", lambda tensor: "cuda")  # the numbers are those of the CPU
    inputs = tensors(9, dtype)
    with Asked() as asked:
        found = with_gradients(lambda *three: causal_attention(*three, **kind), inputs)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    for one, other in zip(found, with_gradients(lambda *three: written_out(*three, **kind), wide), strict=True):
        away = (one.double() - other).norm() / other.norm()
        assert away < (1e-6 if dtype is torch.float32 else 2e-2)
    assert asked.groups == ([] if "softcap" in kind else [dtype is torch.bfloat16 and not kind])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_for_cuda_counts_what_attention_keeps_there(dtype):
    query, key, value = (tensor.detach().requires_grad_() for tensor in tensors(64, getattr(torch, dtype), "meta"))
    live = LiveBytes("kept")
    live.hold([query, key, value], "there")
    with AsOnDevice("cuda"), live:
        found = causal_attention(query, key, value)
    heads, tokens, size = query.shape[1:]
    once_a_head = 2 * 4 * heads * tokens * size if dtype == "float32" else 0  # keys and values
    assert live.live["kept"] == once_a_head + found.nbytes + 4 * heads * tokens


@pytest.mark.parametrize(("groups", "mask"), [(True, None), (True, 1), (False, None), (False, 1)])
def test_a_plan_for_cuda_knows_which_attention_of_a_model_keeps_the_scores(groups, mask):
    query, key, value = (tensor.detach().requires_grad_() for tensor in tensors(64, device="meta"))
    if not groups:
        key = value = torch.empty_like(query, requires_grad=True)
    seen = None if mask is None else torch.ones(64, 64, dtype=torch.bool, device="meta")
    with AsOnDevice("cuda") as device:
        scaled_dot_product_attention(query, key, value, seen, enable_gqa=groups)
    assert device.plain is groups


def one_row_each(query, key, value, starts, key_starts, scale):
    """What torch's kernel computes of several rows, shape (tokens, heads, size); no window."""
    parts = [
        (query[a:b], key[c:d], value[c:d])
        for (a, b), (c, d) in zip(pairwise(starts.tolist()), pairwise(key_starts.tolist()), strict=True)
    ]
    made = [causal_attention(*(t.transpose(0, 1)[None] for t in part), scaling=scale)[0] for part in parts]
    return torch.cat(made, dim=1).transpose(0, 1)


def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    return one_row_each(query, key, value, cu_seq_q, cu_seq_k, None)


def of_2_11(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    assert window_size == (-1, 0)
    return one_row_each(q, k, v, cu_seq_q, cu_seq_k, scale)


def of_2_12(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa
    return of_2_11(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.mark.parametrize("kernel", [of_2_10, of_2_11, of_2_12])
def test_every_torch_that_has_the_kernel_is_asked_in_its_own_words(kernel, monkeypatch):
    monkeypatch.setattr(varlen_module, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "varlen", attention.varlen.__wrapped__)
    older = kernel is of_2_10
    assert attention.knows_varlen(64, None, 64**-0.5)
    assert attention.knows_varlen(64, None, 0.5) is attention.knows_varlen(64, 7, None) is not older
    lengths = [5, 1, 9]
    inputs = tensors(sum(lengths))
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    scaling = None if older else 0.5
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in inputs), strict=True)
    alone = torch.cat([causal_attention(*part, scaling=scaling) for part in parts], dim=2)
    assert torch.equal(varlen_attention(*inputs, starts, starts, 9, 9, scaling=scaling), alone)


def test_this_torch_has_the_kernel():
    assert attention.knows_varlen(64, None, 64**-0.5)


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
