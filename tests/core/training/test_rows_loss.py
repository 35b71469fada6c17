"""The quick ways to a loss give the same number and the same gradients as the plain one, or are not taken."""

import random
import re
import weakref

import attrs
import pytest
import torch
import transformers
from sharp_models import sharp
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

import tunekit as tk
from tunekit.core.common.distributions import release
from tunekit.core.data.codec import IGNORED
from tunekit.core.memory.weightless import AsOnDevice
from tunekit.core.training import head_loss as head_losses
from tunekit.core.training import segments
from tunekit.core.training.head_loss import head_loss, without_head
from tunekit.core.training.rows_loss import RowsLoss, choose
from tunekit.testing import tiny_model

VOCABULARY = 100
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = {**SHAPE, "intermediate_size": 64, "num_key_value_heads": 2}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}

BOTH = {
    "llama": LlamaConfig(**WIDE),
    "llama-tied": LlamaConfig(**WIDE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**WIDE),
    "qwen3": Qwen3Config(**WIDE, head_dim=8),
    "mistral": MistralConfig(**WIDE, sliding_window=64),
    "mistral-looking-back": MistralConfig(**WIDE, sliding_window=8),
    "mixtral": MixtralConfig(**WIDE, num_local_experts=4),
    "gemma": GemmaConfig(**WIDE, head_dim=8),
    "gemma2": Gemma2Config(**WIDE, head_dim=8, sliding_window=8, attn_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(**WIDE, head_dim=8),
    "phi": PhiConfig(**WIDE),
    "phi3": Phi3Config(**WIDE),
    "gpt2": GPT2Config(**GPT2, **NO_DROPOUT),
    "gpt2-eager": GPT2Config(**GPT2, **NO_DROPOUT, attn_implementation="eager"),
    "opt": OPTConfig(**SHAPE, **OPT),
    "neox": GPTNeoXConfig(**SHAPE, intermediate_size=64),
    "granite": GraniteConfig(**WIDE, logits_scaling=8.0),
    "cohere": CohereConfig(**WIDE),
}
if release(transformers.__version__) < (5, 23):  # it has no soft caps in the attention that we stand in for
    del BOTH["gemma2"]
CHUNKED_ALONE = {
    "bloom": (BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY), "cannot be chosen"),
    "gpt-oss": (
        GptOssConfig(**WIDE, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
        "not plainly causal: s_aux",
    ),
    "mamba": (
        MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY),
        "a row changes the row after it",
    ),
}


def rows(lengths=(7, 13, 5, 21), seed=0):
    drawn = random.Random(seed)
    made = []
    for length in lengths:
        ids = [drawn.randrange(5, VOCABULARY) for _ in range(length)]
        made.append({"input_ids": ids, "labels": [IGNORED] * (length // 2) + ids[length // 2 :]})
    return made


def loss_and_gradient(way, given):
    way.model.zero_grad()
    with way.training():
        loss = way(way.model, given)
        loss.backward()
    gradients = [p.grad.flatten() for p in way.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


def alone(model, given):
    """The loss and gradient of each row on its own, as transformers' own forward pass gives them."""
    model.zero_grad()
    total = 0.0
    for row in given:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = cross_entropy(logits, labels[1:], ignore_index=IGNORED, reduction="sum")
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def best(model, **wanted):
    return choose(model, rows(), 0, "cpu", **{"padding_free": True, "chunked": True, **wanted})


@pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)
def test_without_padding_and_in_chunks_the_gradient_is_that_of_each_row_alone(config, monkeypatch):
    monkeypatch.setattr(head_losses, "CHUNK_TOKENS", 8)
    monkeypatch.setitem(head_losses.CHUNK_NUMBERS, "cpu", 8 * VOCABULARY)
    model = sharp(config)
    way = best(model)
    assert (way.padding_free, way.chunked, way.notes) == (True, True, ())
    expected, gradient = alone(model, rows())
    loss, found = loss_and_gradient(way, rows())
    assert loss == pytest.approx(expected, rel=1e-6)
    assert ((found - gradient).norm() / gradient.norm()).item() < 1e-5


@pytest.mark.parametrize(("config", "reason"), CHUNKED_ALONE.values(), ids=CHUNKED_ALONE)
def test_a_model_that_cannot_do_without_padding_is_padded_and_says_why(config, reason):
    model = sharp(config)
    way = best(model)
    assert (way.padding_free, way.chunked) == (False, True)
    assert [bool(re.search(reason, note)) for note in way.notes] == [True]
    expected, gradient = alone(model, rows())
    loss, found = loss_and_gradient(way, rows())
    assert loss == pytest.approx(expected, rel=1e-6)
    assert ((found - gradient).norm() / gradient.norm()).item() < 1e-5


def test_a_model_that_changes_its_logits_afterwards_gets_them_whole():
    class Cubed(LlamaForCausalLM):
        def forward(self, *inputs, **options):
            out = super().forward(*inputs, **options)
            out.logits = out.logits**3
            return out

    torch.manual_seed(0)
    way = best(Cubed(BOTH["llama"]))
    assert (way.padding_free, way.chunked) == (True, False)
    assert [bool(re.search("no logits in chunks: the loss is", note)) for note in way.notes] == [True]


def test_where_both_ways_are_right_they_are_tried_in_one_forward_pass():
    model, passes = sharp(BOTH["llama"]), []
    model.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    best(model)
    # With a gradient, what each of two rows has from the other; the plain one, and the two ways together; in float64,
    # each row alone, and all together; then how accurate they are: in float64, plainly, and so.
    assert passes == [True] * 2 + [False] * 2 + [False] * (len(rows()) + 1) + [True] * 3


def test_each_way_can_be_switched_off():
    model = sharp(BOTH["llama"])
    for wanted in ({"padding_free": False}, {"chunked": False}, {"padding_free": False, "chunked": False}):
        way = best(model, **wanted)
        assert {"padding_free": way.padding_free, "chunked": way.chunked} == {
            "padding_free": True,
            "chunked": True,
            **wanted,
        }
        assert loss_and_gradient(way, rows())[0] == pytest.approx(alone(model, rows())[0], rel=1e-6)


@pytest.mark.parametrize("method", [tk.LoRA(rank=4), tk.IA3(), tk.LoHa(rank=2), tk.LoKr(rank=2)], ids=lambda m: m.name)
def test_adapters_get_the_gradient_they_get_with_padding(method):
    torch.manual_seed(0)
    model = method.attach(sharp(BOTH["llama"]), tk.Context(model_id="tiny", total_steps=10))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    way = best(model)
    assert (way.padding_free, way.chunked) == (True, True)
    loss, gradient = loss_and_gradient(way, rows())
    expected, plain = loss_and_gradient(RowsLoss(model=model, pad_id=0, device="cpu"), rows())
    assert loss == pytest.approx(expected, rel=1e-6)
    assert ((gradient - plain).norm() / plain.norm()).item() < 1e-5


def test_an_attention_that_looks_into_other_rows_is_not_taken(monkeypatch):
    whole = segments.attend

    def leaking(*tensors, segments, **options):
        return whole(*tensors, segments=attrs.evolve(segments, lengths=[sum(segments.lengths)]), **options)

    monkeypatch.setattr(segments, "attend", leaking)
    way = best(sharp(BOTH["llama"]))
    assert (way.padding_free, list(way.notes)) == (False, ["no rows without padding: a row changes the row after it"])


def test_the_model_is_left_as_it_was_also_where_training_raises():
    model = tiny_model()
    batch = torch.tensor([[5, 6, 7, 8]])
    before = model(batch).logits
    way = best(model)

    def train():
        with way.training():
            with way.paused():
                assert torch.equal(model(batch).logits, before)
            way(model, rows())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert torch.equal(model(batch).logits, before)
    assert "forward" not in vars(model.get_output_embeddings())


# The loss from hidden states -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_loss_in_chunks_is_cross_entropy_with_its_gradients(dtype, trained, monkeypatch):
    monkeypatch.setattr(head_losses, "CHUNK_TOKENS", 7)
    monkeypatch.setitem(head_losses.CHUNK_NUMBERS, "cpu", 7 * 50)
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=True).to(dtype).requires_grad_(trained)
    hidden = (3 * torch.randn(40, 16)).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (40,))
    weights = list(head.parameters()) if trained else []

    plain = cross_entropy(head(hidden).float(), targets, reduction="sum")
    expected = torch.autograd.grad(plain / 40, [hidden, *weights])
    loss = head_loss(hidden, targets, head, weights, 50)
    found = torch.autograd.grad(loss / 40, [hidden, *weights])

    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for gradient, wanted in zip(found, expected, strict=True):
        assert gradient.dtype == wanted.dtype
        assert ((gradient - wanted).norm() / wanted.norm()).item() < (1e-6 if dtype == torch.float32 else 1e-2)


def test_large_logits_do_not_overflow():
    head = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1e4], [-1e4]]))
    hidden = torch.ones(1, 1, requires_grad=True)
    loss = head_loss(hidden, torch.tensor([1]), head, [], 2)
    assert loss.item() == pytest.approx(2e4)


def test_no_more_logits_than_a_chunk_are_held(monkeypatch):
    monkeypatch.setattr(head_losses, "CHUNK_TOKENS", 64)
    monkeypatch.setitem(head_losses.CHUNK_NUMBERS, "cpu", 64 * VOCABULARY)
    head, made, sizes, held = nn.Linear(8, VOCABULARY), [], [], []

    def watched(hidden):
        held.append(sum(logits() is not None for logits in made))
        logits = head(hidden)
        made.append(weakref.ref(logits.untyped_storage()))
        sizes.append(len(hidden))
        return logits

    loss = head_loss(torch.randn(1000, 8, requires_grad=True), torch.zeros(1000).long(), watched, [], VOCABULARY)
    assert loss.requires_grad
    assert max(sizes) == 64
    assert sum(sizes) == 1000
    assert max(held) == 0


@pytest.mark.parametrize(("device", "tokens"), [("cuda:1", 1046), ("cpu", 128)])
def test_a_chunk_is_what_suits_the_device_also_where_a_step_is_rehearsed(device, tokens):
    head, sizes = nn.Linear(2, 128_256, bias=False, device="meta"), []

    def watched(hidden):
        sizes.append(len(hidden))
        return head(hidden)

    hidden = torch.ones(1500, 2, device="meta", requires_grad=True)
    with AsOnDevice(device):
        head_loss(hidden, torch.zeros(1500, device="meta").long(), watched, [], 128_256)
    assert sizes[0] == max(sizes) == tokens


class Counting(nn.Linear):
    """An output layer that notes how many tokens it makes logits of."""

    def forward(self, hidden):
        self.seen.append(hidden.shape[:-1].numel())
        return super().forward(hidden)


def test_only_supervised_tokens_reach_the_head():
    model = sharp(BOTH["llama"])
    head = Counting(32, VOCABULARY, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    head.seen = []
    model.lm_head = head
    way = best(model)
    head.seen.clear()
    loss_and_gradient(way, rows())
    assert head.seen == [sum(label != IGNORED for row in rows() for label in row["labels"][1:])]


def test_without_its_head_a_model_gives_what_the_head_is_given():
    model = sharp(BOTH["llama"])
    ids = torch.tensor([[5, 6, 7]])
    with without_head(model.lm_head) as real:
        hidden = model(ids, use_cache=False).logits
    assert hidden.shape == (1, 3, 32)
    assert torch.equal(real(hidden), model(ids).logits)
