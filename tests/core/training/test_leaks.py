"""Rows of one forward pass do not change each other by a bit, in any dtype; where they would, they are not together."""

import random

import attrs
import pytest
import torch
from leaking_families import APART, LEAKING, LEAKING_TOO, SIZE, VOCABULARY, family
from sharp_models import sharp
from transformers import Llama4TextConfig, LlamaConfig, LlamaForCausalLM, Phi3Config

import tunekit as tk
from tunekit.core.run import files
from tunekit.core.training import segments
from tunekit.core.training.rows_loss import RowsLoss, choose
from tunekit.testing import tiny_tokenizer

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


LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
LONG_ROPE |= {"original_max_position_embeddings": 16}
CHUNKS = {"attention_chunk_size": 16, "layer_types": ["chunked_attention", "full_attention"], "moe_layers": []}


@DTYPES
def test_rows_that_lengthen_the_positions_of_others_go_through_the_model_one_by_one(dtype):
    model = sharp(Phi3Config(**SIZE, original_max_position_embeddings=16, rope_parameters=LONG_ROPE)).to(dtype)
    way = chosen(model)
    assert (way.padding_free, way.apart) == (False, True)
    assert way.notes[-1].startswith("no rows together: their loss is ")
    alone = sum(loss(way, [row]) for row in rows(9, 23))
    assert loss(way, rows(9, 23)) == pytest.approx(alone, rel=1e-6)
    together = loss(attrs.evolve(way, apart=False), rows(9, 23))
    assert together != pytest.approx(alone, rel=1e-4)
    short = choose(model, rows(9, 15), 0, "cpu", padding_free=True, chunked=True)
    assert not short.apart


@DTYPES
def test_what_the_attention_is_not_told_of_is_seen_below_the_rounding_of_half_precision(dtype):
    model = sharp(Llama4TextConfig(**SIZE, head_dim=8, num_local_experts=1, intermediate_size_mlp=64, **CHUNKS)).to(
        dtype
    )
    way = chosen(model)
    assert (way.padding_free, way.apart) == (False, False)
    assert way.notes[0].startswith("no rows without padding: ")
    alone = sum(loss(way, [row]) for row in rows(9, 23))
    assert loss(way, rows(9, 23)) == pytest.approx(alone, rel=1e-6 if dtype == torch.float32 else 1e-2)


def test_a_run_of_rows_one_by_one_is_the_same_in_any_micro_batch(tmp_path):
    sharp(
        Phi3Config(**{**SIZE, "vocab_size": 300}, original_max_position_embeddings=16, rope_parameters=LONG_ROPE)
    ).save_pretrained(tmp_path / "phi3")
    tiny_tokenizer().save_pretrained(tmp_path / "phi3")
    texts = [{"text": "abc" * count} for count in (2, 3, 4, 8, 9, 10)]
    adapter = tk.LoRA(rank=2, targets=("o_proj",))

    def run(name, micro):
        trainer = tk.SFT(
            max_steps=3, batch_size=6, micro_batch_size=micro, optimizer="sgd", learning_rate=1e-2, save_every=1
        )
        pipeline = tk.Pipeline(
            model=str(tmp_path / "phi3"),
            data=tk.InMemory(rows=texts),
            validation=0,
            evaluators=(),
            adapter=adapter,
            trainer=trainer,
        )
        return pipeline.run(tmp_path / name)

    one, auto = run("one", 1), run("auto", "auto")
    assert "no rows together" in (tmp_path / "auto" / files.LOG).read_text()
    steps = [[(step["loss"], step["grad_norm"]) for step in each.history if "loss" in step] for each in (one, auto)]
    assert len(steps[0]) == 3
    assert steps[0] == steps[1]
