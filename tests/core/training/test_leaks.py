"""Rows of one forward pass do not change each other by a bit, in any dtype; where they would, they are not together."""

import random

import attrs
import pytest
import torch
from leaking_families import APART, LEAKING, LEAKING_TOO, SIZE, VOCABULARY, family
from sharp_models import sharp
from transformers import LlamaConfig, LlamaForCausalLM

from tunekit.core.training import segments
from tunekit.core.training.rows_loss import RowsLoss, choose

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
NOTE = "no rows without padding: a row changes the row after it"


def rows(*lengths, seed=0, common=0):
    drawn = random.Random(seed)
    begin = [random.Random(99).randrange(5, VOCABULARY) for _ in range(common)]
    texts = [begin + [drawn.randrange(5, VOCABULARY) for _ in range(length - common)] for length in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in texts]


def chosen(model, sharing=()):
    return choose(model, rows(9, 23), 0, "cpu", padding_free=True, chunked=True, sharing=sharing)


def loss(way, given):
    with torch.no_grad(), way.training():
        return float(way(way.model.eval(), given))


def check_together(kind, dtype):
    """Rows of this family are padded, with a note; their loss is that of each row alone, as far as it is rounded."""
    model = sharp(family(kind)).to(dtype)
    way = chosen(model)
    assert (way.padding_free, way.notes[0]) == (False, NOTE)
    plain = RowsLoss(model=model, pad_id=0, device="cpu")
    apart = sum(loss(plain, [row]) for row in rows(9, 23))
    assert loss(way, rows(9, 23)) == pytest.approx(apart, rel=1e-6 if dtype == torch.float32 else 1e-2)


@DTYPES
@pytest.mark.parametrize("kind", LEAKING)
def test_rows_that_a_state_is_handed_on_to_are_padded(kind, dtype):
    check_together(kind, dtype)


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("kind", LEAKING_TOO)
def test_rows_that_a_state_is_handed_on_to_are_padded_in_every_family(kind, dtype):
    check_together(kind, dtype)


@DTYPES
@pytest.mark.parametrize("kind", APART)
def test_rows_end_to_end_are_what_each_is_alone(kind, dtype):
    model = sharp(family(kind)).to(dtype)
    way = chosen(model)
    assert (way.padding_free, way.notes) == (True, ())
    with torch.no_grad(), way.training():
        hidden = model.eval()(**way.batch(rows(9, 23, 5)).inputs, use_cache=False).logits[0, :37]  # then what fills up
        each = [
            model(**way.batch([row]).inputs, use_cache=False).logits[0, : len(row["input_ids"])]
            for row in rows(9, 23, 5)
        ]
    away = (hidden - torch.cat(each)).float().norm() / hidden.float().norm()
    assert float(away) < (1e-6 if dtype == torch.float32 else 3e-2)


@DTYPES
@pytest.mark.parametrize(
    "kind", [kind for kind in APART if "num_experts_per_tok" not in APART[kind] and kind != "mixtral"]
)
def test_other_tokens_beside_a_row_do_not_change_it_by_a_bit(kind, dtype):
    way = chosen(sharp(family(kind)).to(dtype))
    (first, second), (other, another) = rows(9, 23), rows(9, 23, seed=1)
    with torch.no_grad(), way.training():
        found, before, after = (
            way.model.eval()(**way.batch(pair).inputs, use_cache=False).logits[0, :32]
            for pair in ([first, second], [other, second], [first, another])
        )
    assert torch.equal(found[9:], before[9:])
    assert torch.equal(found[:9], after[:9])
    assert not torch.equal(found[:9], before[:9])


class Whispering(LlamaForCausalLM):
    """A Llama in which a token hears all that came before, in rows before its own too, so softly that no loss shows it."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1].register_forward_pre_hook(self.whisper, with_kwargs=True)

    def whisper(self, _, given, named):
        (states,) = given
        return (states + 1e-9 * states.cumsum(1),), named


@DTYPES
def test_what_is_far_below_rounding_is_a_leak_all_the_same(dtype):
    torch.manual_seed(0)
    model = Whispering(LlamaConfig(**SIZE)).to(dtype)
    plain, way = RowsLoss(model=model, pad_id=0, device="cpu"), chosen(model)
    free = attrs.evolve(plain, padding_free=True)
    assert loss(free, rows(9, 23)) == pytest.approx(
        loss(plain, rows(9, 23)), rel=1e-6 if dtype == torch.float32 else 1e-2
    )
    assert (way.padding_free, list(way.notes)) == (False, [NOTE])


@DTYPES
def test_rows_that_share_their_beginning_do_not_see_each_others_ends(dtype, monkeypatch):
    model, alike = sharp(LlamaConfig(**SIZE)).to(dtype), rows(44, 47, common=40)
    assert chosen(model, alike).shared
    whole = segments.attend

    def overhearing(*tensors, segments, **options):
        found, _ = whole(*tensors, segments=segments, **options)
        return (found + 1e-9 * found.cumsum(1) if segments.after else found), None

    monkeypatch.setattr(segments, "attend", overhearing)
    way = chosen(model, alike)
    assert (way.padding_free, way.shared) == (True, False)
    assert list(way.notes) == ["no shared prefixes: a row changes the row after it"]


def test_the_question_leaves_no_gradient_and_no_hook():
    model = sharp(LlamaConfig(**SIZE))
    chosen(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks
