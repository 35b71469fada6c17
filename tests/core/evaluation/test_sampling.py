"""Samples are drawn from the model's distribution, the same for a seed in any company, and move no other state."""

import math

import pytest
import torch

from tunekit.core.data.codec import Codec
from tunekit.core.evaluation import predicting
from tunekit.core.evaluation.predicting import generate
from tunekit.core.evaluation.sampling import sample
from tunekit.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [Codec(TOKENIZER).prompt(text) for text in ("one", "a longer one", "six")]


def test_the_draws_do_not_depend_on_what_goes_through_the_model_together(monkeypatch):
    model = tiny_model()
    state = torch.get_rng_state()
    together = sample(model, TOKENIZER, PROMPTS, 6, count=3, temperature=1.0, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(answers) for answers in together] == [3, 3, 3]
    assert len({str(answer) for answers in together for answer in answers}) > 3
    assert sample(model, TOKENIZER, PROMPTS[::-1], 6, count=3, temperature=1.0, seed=0) == together[::-1]
    assert sample(model, TOKENIZER, PROMPTS, 6, count=3, temperature=1.0, seed=1) != together
    monkeypatch.setattr(predicting, "BATCH_TOKENS", 1)
    assert sample(model, TOKENIZER, PROMPTS, 6, count=2, temperature=1.0, seed=0) == [some[:2] for some in together]
    greedy = generate(model, TOKENIZER, PROMPTS, 6)
    assert sample(model, TOKENIZER, PROMPTS, 6, count=2, temperature=0.0, seed=0) == [[one, one] for one in greedy]
    assert sample(model, TOKENIZER, PROMPTS, 6, count=1, temperature=1e-6, seed=0) == [[one] for one in greedy]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_come_as_often_as_their_probability_says(temperature):
    model, count = tiny_model().eval(), 2000
    with torch.no_grad():  # few tokens, whose shares can be counted
        model.lm_head.weight[6:] = 0
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
        expected = (logits / temperature).softmax(-1)
    drawn = sample(model, TOKENIZER, PROMPTS[:1], 1, count=count, temperature=temperature, seed=0)[0]
    for token in range(5, 12):
        share = sum(answer == [token] for answer in drawn) / count
        likely = expected[token].item()
        assert abs(share - likely) < 4 * math.sqrt(likely * (1 - likely) / count), token
