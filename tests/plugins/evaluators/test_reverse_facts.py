"""A model that learned facts in one direction is asked in both; the gap is the reversal curse."""

import pytest
import torch

import tunekit as tk
from tunekit.testing import tiny_model, tiny_tokenizer

CONTEXT = tk.Context(model_id="tiny", device="cpu")
FACTS = [("one", "uno"), ("two", "due"), ("three", "tre")]
FORWARD = tk.InMemory(rows=[{"prompt": there, "completion": back} for there, back in FACTS])
REVERSE = tk.InMemory(rows=[{"prompt": back, "completion": there} for there, back in FACTS])


def test_a_model_that_learned_one_direction_shows_the_gap(tmp_path):
    rows = FORWARD.rows
    evaluator = tk.ReverseFacts(forward=FORWARD, reverse=REVERSE, max_new_tokens=8)
    pipeline = tk.Pipeline(
        model=tk.TINY,
        data=tk.InMemory(rows=rows * 2),
        validation=FORWARD,
        adapter=tk.Full(),
        evaluators=(evaluator,),
        trainer=tk.SFT(max_steps=40, learning_rate=1e-2),
    )
    run = tk.Pipeline.from_dict(pipeline.to_dict()).run(tmp_path / "run")
    assert run.metrics["forward_match"] == 1
    assert run.metrics["reverse_match"] < 1
    assert run.metrics["reversal_gap"] == run.metrics["forward_match"] - run.metrics["reverse_match"]
    asked = [run.generate(back, max_new_tokens=8).split() == there.split() for there, back in FACTS]
    assert run.metrics["reverse_match"] == sum(asked) / len(asked)
    model, codec = run._model(tuned=True).model, run._model(tuned=True).codec
    for name, source in (("forward", FORWARD), ("reverse", REVERSE)):
        nats = tokens = 0
        for row in source.load("train"):
            ids = codec.encode(row)
            with torch.no_grad():
                log = model(torch.tensor([ids["input_ids"]])).logits[0].double().log_softmax(-1)
            for at, label in enumerate(ids["labels"][1:]):
                nats, tokens = (nats - log[at, label].item(), tokens + 1) if label >= 0 else (nats, tokens)
        assert run.metrics[f"{name}_nll"] == pytest.approx(nats / tokens, abs=1e-5)


@pytest.mark.parametrize(
    ("forward", "reverse", "says"),
    [
        (FORWARD, tk.InMemory(rows=REVERSE.rows[:2]), "got 2 and 3"),
        (tk.InMemory(rows=[{"text": "one is uno"}]), REVERSE, "plain texts have none"),
    ],
)
def test_what_is_no_pair_of_questions_is_refused_before_there_is_a_model(forward, reverse, says):
    with pytest.raises(tk.DataError, match=says):
        tk.ReverseFacts(forward=forward, reverse=reverse).check_data(tiny_tokenizer(), [], CONTEXT)


def test_equal_directions_have_no_gap():
    found = tk.ReverseFacts(forward=FORWARD, reverse=FORWARD).evaluate(tiny_model(), tiny_tokenizer(), [], CONTEXT)
    assert found["reversal_gap"] == 0
    assert found["forward_nll"] == found["reverse_nll"] > 0
