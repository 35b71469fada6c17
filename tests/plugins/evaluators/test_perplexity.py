"""Perplexity through a sliding window predicts each token once, from no less than the window promises."""

import math

import pytest
import torch

import tunekit as tk
from tunekit.core.data.batching import supervised_tokens
from tunekit.core.data.codec import IGNORED, Codec
from tunekit.core.evaluation import predicting
from tunekit.plugins.evaluators.perplexity import views
from tunekit.testing import tiny_model, tiny_tokenizer

CONTEXT = tk.Context(model_id="tiny", device="cpu")
CODEC = Codec(tiny_tokenizer())
ROWS = [
    CODEC.encode({"text": "Once upon a time there was a king who had three sons."}),
    CODEC.encode({"messages": [{"role": "user", "content": "two " * 9}, {"role": "assistant", "content": "due " * 9}]}),
    CODEC.encode({"text": "No."}),
]


@pytest.mark.parametrize(("window", "stride"), [(8, 3), (8, 7), (16, 1), (500, 20)])
def test_each_token_is_predicted_once_from_the_tokens_that_the_window_shows(window, stride, monkeypatch):
    model = tiny_model().eval()
    total, count = 0.0, 0
    for row in ROWS:
        ids, labels = row["input_ids"], row["labels"]
        for at in range(1, len(ids)):
            if labels[at] == IGNORED:
                continue
            # The second way: the first window that reaches the token, one forward pass for this token alone.
            start = next(start for start in range(0, len(ids), stride) if start + window > at)
            assert at - start >= min(at, window - stride)
            with torch.no_grad():
                log = model(torch.tensor([ids[start : at + 1]])).logits[0, -2].double().log_softmax(-1)
            total, count = total - log[labels[at]].item(), count + 1
    evaluator = tk.Perplexity(window=window, stride=stride)
    found = evaluator.evaluate(model, CODEC.tokenizer, ROWS, CONTEXT)
    assert found["nll"] == pytest.approx(total / count, abs=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.weights["nll"] == [supervised_tokens(row) for row in ROWS]
    monkeypatch.setattr(predicting, "BATCH_TOKENS", 1)
    turned = evaluator.evaluate(model, CODEC.tokenizer, ROWS[::-1], CONTEXT)
    assert turned == pytest.approx(dict(found), rel=1e-6)


def test_a_window_that_holds_every_row_changes_nothing_and_more_context_helps_a_model_that_uses_it():
    model = tiny_model().eval()
    whole, wide = (
        tk.Perplexity(**fields).evaluate(model, CODEC.tokenizer, ROWS, CONTEXT) for fields in ({}, {"window": 200})
    )
    assert wide == whole
    assert [len(view["input_ids"]) for view in views(ROWS[0], 20, 15)] == [20, 20, 20, len(ROWS[0]["input_ids"]) - 45]
    assert tk.Perplexity(window=9).evaluate(model, CODEC.tokenizer, ROWS, CONTEXT) == tk.Perplexity(
        window=9, stride=4
    ).evaluate(model, CODEC.tokenizer, ROWS, CONTEXT)


@pytest.mark.parametrize("fields", [{"stride": 4}, {"window": 8, "stride": 8}, {"window": 1}])
def test_a_stride_that_would_leave_tokens_out_is_refused(fields):
    with pytest.raises(tk.ConfigError, match=r"Perplexity\.(stride|window)"):
        tk.Perplexity(**fields)
