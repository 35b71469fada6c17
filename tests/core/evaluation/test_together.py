"""Rows and prompts that go through a model together give what each gives alone; a model of which that is not so is asked
about them in other groups, in every dtype."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tunekit.core.evaluation import together
from tunekit.core.evaluation.predicting import generate, row_losses
from tunekit.core.evaluation.together import groups

SIZE = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
LONG_ROPE |= {"original_max_position_embeddings": 16}
# How each reads rows padded on the right, and answers prompts padded on the left.
FAMILIES = {
    "llama": ({}, "padded", "padded"),
    "bloom": ({"n_layer": 2, "n_head": 4}, "padded", "padded"),
    "mixtral": ({"num_local_experts": 4}, "padded", "padded"),
    "phi3": ({"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 16}, "alike", "alike"),
    "minimax": (
        {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "block_size": 16},
        "padded",
        "alike",
    ),
    "rwkv": ({}, "padded", "alone"),
}
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=2)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(together, "_known", {})


def model(kind, dtype=torch.float32):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZE, eos_token_id=None, **FAMILIES[kind][0]))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return made.to(dtype).eval()


def texts(*lengths):
    drawn = random.Random(3)
    return [[drawn.randrange(5, 100) for _ in range(length)] for length in lengths]


def encoded(rows):
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.mark.filterwarnings("ignore:.* a row beside a longer one")
@DTYPES
@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_are_read_and_answered_as_each_is_alone(kind, dtype):
    asked, rows = model(kind, dtype), texts(11, 40, 11, 27)
    losses, _ = row_losses(asked, TOKENIZER, encoded(rows))
    alone = [row_losses(asked, TOKENIZER, [row])[0][0] for row in encoded(rows)]
    assert losses == pytest.approx(alone, rel=1e-6 if dtype == torch.float32 else 1e-2)
    answers = generate(asked, TOKENIZER, rows, 8)
    if dtype == torch.float32:  # in half precision two tokens may be as likely but for rounding
        assert answers == [generate(asked, TOKENIZER, [row], 8)[0] for row in rows]
    assert list(together._known.values()) == list(FAMILIES[kind][1:])


def test_it_is_said_once_and_asked_once_a_model():
    asked, rows, passes = model("phi3"), texts(11, 40), []
    with pytest.warns(
        UserWarning, match="phi3: a row beside a longer one is not read as it is alone; .* of one length"
    ):
        row_losses(asked, TOKENIZER, encoded(rows))
    asked.register_forward_pre_hook(lambda *_: passes.append(1))
    row_losses(asked, TOKENIZER, encoded(rows))
    assert len(passes) == 2


def test_a_length_that_matters_is_tried_beyond_what_models_are_asked_with(monkeypatch):
    far = {**LONG_ROPE, "original_max_position_embeddings": 60}
    monkeypatch.setitem(FAMILIES, "phi3", ({"rope_parameters": far, "original_max_position_embeddings": 60}, "", ""))
    asked = model("phi3")
    row_losses(asked, TOKENIZER, encoded(texts(20, 50)))
    with pytest.warns(UserWarning, match="not read as it is alone"):
        row_losses(asked, TOKENIZER, encoded(texts(20, 70)))
    generate(asked, TOKENIZER, texts(20, 50), 4)
    with pytest.warns(UserWarning, match="not answered as it is alone"):  # the longer comes there while it is answered
        generate(asked, TOKENIZER, texts(20, 50), 30)


def test_a_model_that_takes_no_padding_is_asked_one_row_at_a_time():
    asked = model("llama")
    asked.register_forward_pre_hook(
        lambda _, __, named: 1 / (named["input_ids"].shape[0] == 1) and None, with_kwargs=True
    )
    with pytest.warns(UserWarning, match="evaluated are one row at a time"):
        losses, _ = row_losses(asked, TOKENIZER, encoded(texts(5, 9)))
    assert losses == pytest.approx(row_losses(model("llama"), TOKENIZER, encoded(texts(5, 9)))[0], rel=1e-6)


@pytest.mark.parametrize(
    ("how", "expected"),
    [("padded", [[1, 3], [0, 2]]), ("alike", [[1, 3], [0], [2]]), ("alone", [[1], [3], [0], [2]])],
)
def test_groups(how, expected):
    assert list(groups(how, [3, 4, 2, 4], 8)) == expected
