"""Ways to the loss are tried on short excerpts of rows, unless the model computes otherwise from a length on."""

import pytest
import torch
from sharp_models import sharp
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config

from tunekit.core.data.codec import IGNORED
from tunekit.core.training import segments
from tunekit.core.training.excerpts import TOKENS, excerpts
from tunekit.core.training.rows_loss import choose

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"intermediate_size": 64, "vocab_size": 500, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def row(tokens, prompt):
    ids = list(range(5, 5 + tokens))
    return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


def tried(model, rows):
    """The way that is chosen, and how many tokens went through the model at a time."""
    seen = []
    model.register_forward_pre_hook(lambda _, __, options: seen.append(options["input_ids"].numel()), with_kwargs=True)
    return choose(model, rows, 0, "cpu", padding_free=True, chunked=True), seen


@pytest.mark.parametrize("prompt", [0, 1, 10, 100, 199])
def test_an_excerpt_is_where_the_loss_begins(prompt):
    (found,) = excerpts([row(200, prompt)], LlamaConfig(**SHAPE))
    whole = row(200, prompt)
    assert len(found["input_ids"]) == TOKENS
    at = found["input_ids"][0] - 5
    assert found == {name: whole[name][at : at + TOKENS] for name in whole}
    assert sum(label != IGNORED for label in found["labels"][1:]) >= min(TOKENS // 2, 200 - max(prompt, 1))


@pytest.mark.parametrize(
    ("config", "whole"),
    [
        (LlamaConfig(**SHAPE), False),
        (MistralConfig(**SHAPE, sliding_window=4096), False),
        (MistralConfig(**SHAPE, sliding_window=8), False),
        (MistralConfig(**SHAPE, sliding_window=50), True),
        (LlamaConfig(**SHAPE, attention_chunk_size=[50, None]), True),
        (LlamaConfig(**SHAPE, nested={"original_max_position_embeddings": 64}), True),
        (Qwen2Config(**SHAPE, max_window_layers=24), False),
    ],
    ids=["plain", "window-beyond", "window-within", "window", "chunks", "positions", "number-of-layers"],
)
def test_rows_are_whole_where_a_length_that_matters_is_within_them(config, whole):
    rows = [row(20, 5), row(200, 5)]
    assert (excerpts(rows, config) is rows) == whole


def test_the_ways_are_tried_on_excerpts():
    way, seen = tried(sharp(LlamaConfig(**SHAPE)), [row(20, 5), row(400, 5)])
    assert (way.padding_free, way.chunked, way.notes) == (True, True, ())
    assert seen[2:4] == [2 * TOKENS, 20 + TOKENS]  # padded, and end to end
    assert max(seen) == 2 * TOKENS


def test_a_window_that_is_not_kept_is_seen_in_rows_beyond_it(monkeypatch):
    whole = segments.attend
    monkeypatch.setattr(
        segments, "attend", lambda *tensors, **options: whole(*tensors, **{**options, "sliding_window": None})
    )
    way, _ = tried(sharp(MistralConfig(**SHAPE, sliding_window=50)), [row(20, 5), row(90, 5)])
    assert not way.padding_free
    assert "the loss is" in way.notes[0]


def test_a_loss_that_is_right_of_whole_rows_alone_is_not_right():
    class Off(LlamaForCausalLM):
        """Another loss for few tokens in a row than for as many rows."""

        def forward(self, input_ids, **options):
            out = super().forward(input_ids, **options)
            if input_ids.shape == (1, 20 + TOKENS):
                out.logits = out.logits * 1.01
            return out

    torch.manual_seed(0)
    way, seen = tried(Off(LlamaConfig(**SHAPE)), [row(20, 5), row(400, 5)])
    assert 420 in seen, "whole rows are asked where excerpts may differ by rounding"
    assert (way.padding_free, way.chunked) == (False, True)
    (note,) = way.notes
    assert note.startswith("no rows without padding: the error of the gradient is ")
