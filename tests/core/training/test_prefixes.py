"""Rows that begin alike have that computed once: the same loss, and the gradient that each row gives alone."""

import attrs
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from sharp_models import sharp
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig

import tunekit as tk
from tunekit.core.common.distributions import release
from tunekit.core.data.codec import IGNORED
from tunekit.core.training import attention, prefixes
from tunekit.core.training.prefixes import LEAST, Layout, group, sharing
from tunekit.core.training.rows_loss import RowsLoss, choose

VOCABULARY = 100
WIDE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64, "eos_token_id": 2}
MODELS = {
    "llama": LlamaConfig(**WIDE),
    "gpt2": GPT2Config(**GPT2, bos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "mistral-looking-back": MistralConfig(**WIDE, sliding_window=8),
    "gemma2": Gemma2Config(**WIDE, head_dim=8, sliding_window=8, attn_logit_softcapping=5.0),
}
if release(transformers.__version__) < (5, 23):  # it has no soft caps in the attention that we stand in for
    del MODELS["gemma2"]


def tokens(seed, count):
    return torch.randint(5, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def row(*parts, learned):
    """A row of these parts whose last `learned` tokens carry loss."""
    ids = [token for part in parts for token in part]
    return {"input_ids": ids, "labels": [*[IGNORED] * (len(ids) - learned), *ids[len(ids) - learned :]]}


SYSTEM, OTHER = tokens(1, 40), tokens(2, 36)
ROWS = [
    row(SYSTEM, tokens(3, 9), learned=4),
    row(tokens(4, 11), learned=11),  # alone
    row(OTHER, tokens(5, 5), learned=5),  # the prefix's last token predicts its first
    row(SYSTEM, tokens(6, 3), learned=20),  # learns from tokens of the prefix, too
    row(OTHER, tokens(7, 14), learned=2),
    row(SYSTEM, tokens(8, 13), learned=53),  # all that it has
]


def loss_and_gradient(way, rows=ROWS):
    way.model.zero_grad()
    with way.training():
        loss = way(way.model, rows)
        loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in way.model.parameters() if p.grad is not None])


def alone(model, rows=ROWS):
    """The loss and gradient of each row on its own, as transformers' own forward pass gives them."""
    model.zero_grad()
    total = 0.0
    for each in rows:
        logits = model(input_ids=torch.tensor([each["input_ids"]]), use_cache=False).logits[0, :-1].float()
        labels = torch.tensor(each["labels"][1:])
        loss = cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def chosen(model, **wanted):
    return choose(
        model, ROWS[:2], 0, "cpu", **{"padding_free": True, "chunked": True, "sharing": sharing(ROWS), **wanted}
    )


# The gradient ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_the_gradient_is_that_of_each_row_alone(config, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 16)
    model = sharp(config)
    way = chosen(model)
    assert (way.padding_free, way.shared, way.notes) == (True, True, ())
    computed = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, given, out: computed.append(out.shape[1]))
    loss, gradient = loss_and_gradient(way)
    assert computed == [sum(len(each["input_ids"]) for each in ROWS) - 2 * len(SYSTEM) - len(OTHER)]
    expected, wanted = alone(model)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert ((gradient - wanted).norm() / wanted.norm()).item() < 1e-5


@pytest.mark.parametrize("method", [tk.LoRA(rank=4), tk.IA3()], ids=lambda method: method.name)
def test_adapters_get_the_gradient_they_get_with_padding(method):
    model = method.attach(sharp(MODELS["llama"]), tk.Context(model_id="tiny", total_steps=10))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    way = chosen(model)
    assert way.shared
    loss, gradient = loss_and_gradient(way)
    expected, wanted = loss_and_gradient(RowsLoss(model=model, pad_id=0, device="cpu"))
    assert loss == pytest.approx(expected, rel=1e-6)
    assert ((gradient - wanted).norm() / wanted.norm()).item() < 1e-5


# Where it is taken ----------------------------------------------------------------------------------------------------


def test_a_model_that_drops_at_random_is_left_alone():
    model = tk.LoRA(rank=4, dropout=0.1).attach(sharp(MODELS["llama"]), tk.Context(model_id="tiny", total_steps=10))
    assert chosen(model).notes == ["no shared prefixes: rows would share their dropout, too"]
    rows_of_update = tk.LoHa(rank=2, dropout=0.1)
    model = rows_of_update.attach(sharp(MODELS["llama"]), tk.Context(model_id="tiny", total_steps=10))
    assert not chosen(model).shared


def test_it_is_not_taken_where_the_loss_is_another(monkeypatch):
    true = Layout.of.__func__

    def from_zero(cls, rows, shared=False):
        found = true(cls, rows, shared)
        return attrs.evolve(found, positions=[at for length in found.lengths for at in range(length)])

    monkeypatch.setattr(Layout, "of", classmethod(from_zero))
    way = chosen(sharp(MODELS["llama"]))
    assert (way.padding_free, way.shared) == (True, False)
    assert way.notes[0].startswith("no shared prefixes: the loss is")


def test_it_is_not_tried_where_it_is_not_wanted_or_rows_are_padded():
    model = sharp(MODELS["llama"])
    assert not chosen(model, sharing=()).shared
    assert not chosen(model, padding_free=False).shared


# Which rows share what ------------------------------------------------------------------------------------------------


def test_a_prefix_too_short_to_pay_is_computed_for_each():
    assert [each.prefix for each in group([[*SYSTEM[:LEAST], 1], [*SYSTEM[:LEAST], 2]])] == [LEAST]
    assert [each.prefix for each in group([[*SYSTEM[: LEAST - 1], 1], [*SYSTEM[: LEAST - 1], 2]])] == [0, 0]


def test_a_document_within_a_system_prompt_is_shared_where_that_saves_more():
    documents = [tokens(9, 200), tokens(10, 200)]
    rows = [[*SYSTEM, *documents[n % 2], *tokens(20 + n, 6)] for n in range(6)]
    assert [(each.rows, each.prefix) for each in group(rows)] == [([0, 2, 4], 240), ([1, 3, 5], 240)]
    rows = [[*SYSTEM, *documents[n % 2][:5], *tokens(20 + n, 6)] for n in range(6)]
    assert [(each.rows, each.prefix) for each in group(rows)] == [([0, 1, 2, 3, 4, 5], 40)]


def test_a_row_may_be_the_prefix_of_others_or_the_same():
    rows = [row(SYSTEM, learned=30), row(SYSTEM, tokens(3, 9), learned=20), row(SYSTEM, learned=40)]
    assert [(each.rows, each.prefix) for each in group([each["input_ids"] for each in rows])] == [([0, 1, 2], 40)]
    model = sharp(MODELS["llama"])
    expected, wanted = alone(model, rows)
    loss, gradient = loss_and_gradient(chosen(model), rows)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert ((gradient - wanted).norm() / wanted.norm()).item() < 1e-5


def test_two_rows_are_picked_to_try_it_on_if_any_share():
    assert sharing(ROWS) == [ROWS[3], ROWS[0]]
    assert sharing([ROWS[0], ROWS[1], ROWS[2]]) == []


def saved_by_one_prefix(rows):
    """Tokens, at most, by the prefixes of all lengths of all rows, where no other is shared."""
    starts = [each[:length] for each in rows for length in range(prefixes.LEAST, len(each) + 1)]
    return max((len(start) * (sum(each[: len(start)] == start for each in rows) - 1) for start in starts), default=0)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=7))
def test_every_token_of_every_row_has_its_place_and_no_single_prefix_saves_more(rows):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prefixes, "LEAST", 2)
        made = [{"input_ids": each, "labels": each} for each in rows]
        layout = Layout.of(made, shared=True)
        assert sorted(row for each in group(rows) for row in each.rows) == list(range(len(rows)))
        for number, each in enumerate(rows):
            places = [layout.place(number, at) for at in range(len(each))]
            assert [layout.tokens[place] for place in places] == each
            assert [layout.positions[place] for place in places] == list(range(len(each)))
        assert sum(map(len, rows)) - len(layout.tokens) >= saved_by_one_prefix(rows)


def test_without_sharing_rows_stand_as_they_are():
    layout = Layout.of(ROWS)
    assert layout.tokens == [token for each in ROWS for token in each["input_ids"]]
    assert (layout.lengths, layout.after) == ([len(each["input_ids"]) for each in ROWS], {})
