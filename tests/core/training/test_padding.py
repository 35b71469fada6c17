"""The mask of padded rows on CUDA is transformers' own, and nobody waits until its values are known."""

import pytest
import torch
from transformers import AttentionMaskInterface, LlamaConfig, MistralConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from tunekit.core.training import padding
from tunekit.core.training.padding import mask, told

LENGTHS = {"padded": (7, 3), "not padded": (7, 7)}
MAKERS = {
    "causal": (create_causal_mask, LlamaConfig()),
    "in a window": (create_sliding_window_causal_mask, MistralConfig(sliding_window=4)),
    "in a window longer than the row": (create_sliding_window_causal_mask, MistralConfig(sliding_window=40)),
}


def made(maker, lengths, how, device="cpu", dtype=torch.bfloat16):
    function, config = MAKERS[maker]
    config._attn_implementation = how
    given = (torch.arange(7) < torch.tensor(lengths)[:, None]).long().to(device)
    return function(config=config, inputs_embeds=torch.ones(2, 7, 4, dtype=dtype, device=device), attention_mask=given,
                    past_key_values=None, position_ids=torch.arange(7, device=device)[None])  # fmt: skip


@pytest.fixture(autouse=True)
def known():
    AttentionMaskInterface.register(padding.ATTENTION, mask)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("maker", MAKERS)
def test_it_is_that_of_transformers(maker, lengths):
    expected = made(maker, lengths, "sdpa")
    with told(min(lengths) < 7):
        found = made(maker, lengths, padding.ATTENTION)
    assert (found is None) is (expected is None)
    assert found is None or torch.equal(found, expected)
    untold = made(maker, lengths, padding.ATTENTION)
    assert untold is None if expected is None else torch.equal(untold, expected)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("maker", MAKERS)
def test_no_value_is_asked_for(maker, lengths):
    with told(min(lengths) < 7):
        made(maker, lengths, padding.ATTENTION, "meta")  # where there are none
    if maker != "in a window":
        with pytest.raises(RuntimeError, match="meta"):
            made(maker, lengths, "sdpa", "meta")


def test_in_float32_there_is_always_one_since_heads_left_in_groups_would_keep_the_scores():
    with told(False):
        found = made("causal", (7, 7), padding.ATTENTION, dtype=torch.float32)
    assert torch.equal(found[0, 0], torch.ones(7, 7).tril().bool())
