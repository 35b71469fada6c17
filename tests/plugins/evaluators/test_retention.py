"""Retention is the likelihood of the user's rows against that of the very base; samples are what the model answers."""

import math

import pytest
import torch

import tunekit as tk
from tunekit.core.data.batching import windows
from tunekit.core.data.codec import IGNORED, Codec
from tunekit.testing import tiny_model, tiny_tokenizer

CONTEXT = tk.Context(model_id="tiny", device="cpu")
TEXTS = [{"text": "The grass is green."}, {"text": "Once upon a time there was a king " * 9}, {"text": "No."}]
TALK = {"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "due"}]}


def nats_of(model, row):
    """The loss of each supervised token, by one forward pass without padding, in float64."""
    with torch.no_grad():
        log = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
    pairs = enumerate(row["labels"][1:])
    return [-log[at, label].item() for at, label in pairs if label != IGNORED]


def test_retention_is_the_mean_over_the_tokens_of_all_rows_cut_into_windows():
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    codec = Codec(tokenizer)
    found = tk.Retention(source=tk.InMemory(rows=TEXTS)).evaluate(model, tokenizer, [], CONTEXT)
    rows = [codec.encode(row) for row in TEXTS]
    assert len(rows[1]["input_ids"]) > 128, "half of the context"
    parts = [part for row in rows for part in windows(row, 128, tokenizer.bos_token_id)]
    losses = [nats_of(model, part) for part in parts]
    flat = [loss for some in losses for loss in some]
    assert found["retention_nll"] == pytest.approx(sum(flat) / len(flat), abs=1e-6)
    assert found["retention_perplexity"] == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-5)
    assert found["forgetting"] == 0
    assert found.weights["retention_nll"] == [len(part) for part in losses]
    talk = tk.Retention(source=tk.InMemory(rows=[TALK])).evaluate(model, tokenizer, [], CONTEXT)
    said = nats_of(model, codec.encode(TALK))
    assert talk["retention_nll"] == pytest.approx(sum(said) / len(said), abs=1e-6)
    first = tk.Retention(source=tk.InMemory(rows=TEXTS), max_rows=1).evaluate(model, tokenizer, [], CONTEXT)
    assert first["retention_nll"] == pytest.approx(sum(losses[0]) / len(losses[0]), abs=1e-6)


@pytest.mark.parametrize(
    "adapter", [tk.LoRA(rank=2), tk.LastLayers(count=1), tk.PromptTuning(virtual_tokens=4)], ids=lambda a: a.name
)
def test_forgetting_is_measured_against_the_base_whatever_is_trained(tmp_path, adapter):
    rows = [{"prompt": "one", "completion": "uno uno uno"}, {"prompt": "six", "completion": "sei sei sei"}]
    pipeline = tk.Pipeline(
        model=tk.TINY,
        data=tk.InMemory(rows=rows * 4),
        validation=tk.InMemory(rows=rows),
        adapter=adapter,
        evaluators=(tk.Retention(source=tk.InMemory(rows=TEXTS)), tk.Samples(prompts=("one", "six"), max_new_tokens=4)),
        trainer=tk.SFT(max_steps=6, evaluate_every=3, learning_rate=5e-2),
    )
    run = pipeline.run(tmp_path / "run")
    assert run.base_metrics["forgetting"] == 0
    assert run.metrics["forgetting"] == run.metrics["retention_nll"] - run.base_metrics["retention_nll"] != 0
    if adapter.name == "lora":
        # The other way round: the tuned model with its adapter switched off is the base that was measured.
        model = run._model(tuned=True).model
        with model.disable_adapter():
            off = pipeline.evaluators[0].evaluate(model, run._model(tuned=True).codec.tokenizer, [], CONTEXT)
        assert off["retention_nll"] == pytest.approx(run.base_metrics["retention_nll"], abs=1e-7)
    low, high = run.result["intervals"]["metrics"]["retention_nll"]["difference"]
    assert low <= run.metrics["forgetting"] <= high
    for name in ("base", "step-000003", "tuned"):
        answers = run.evaluations[name]["details"]["samples"]["answers"]
        assert [answer["prompt"] for answer in answers] == ["one", "six"]
        if name != "step-000003":
            asked = [run.generate(prompt, max_new_tokens=4, tuned=name == "tuned") for prompt in ("one", "six")]
            assert [answer["answer"] for answer in answers] == asked
    resumed = tk.Context(model_id="tiny", device="cpu", base_metrics={"nll": 1.0})
    with pytest.raises(tk.TrainingError, match="did not measure the base"):
        pipeline.evaluators[0].evaluate(tiny_model().eval(), tiny_tokenizer(), [], resumed)


def test_samples_may_go_on_with_plain_texts_and_follow_the_template_of_the_run():
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    asked = []
    original = model.generate

    def generate(**options):
        asked.extend(
            ids[mask.bool()].tolist() for ids, mask in zip(options["input_ids"], options["attention_mask"], strict=True)
        )
        return original(**options)

    model.generate = generate
    found = tk.Samples(prompts=("Once", "At last"), continued=True, max_new_tokens=3).evaluate(
        model, tokenizer, [], CONTEXT
    )
    assert sorted(map(tokenizer.decode, asked)) == ["At last", "Once"]
    assert found == {}
    asked.clear()
    template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}{{ '>' if add_generation_prompt }}"
    context = tk.Context(model_id="tiny", device="cpu", template=template)
    tk.Samples(prompts=("Once",), max_new_tokens=3).evaluate(model, tokenizer, [], context)
    assert tokenizer.decode(asked[0]) == "Once<|im_end|>>"


def test_what_cannot_be_measured_is_refused_before_there_is_a_model():
    tokenizer = tiny_tokenizer()
    preference = {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "c"}],
    }
    with pytest.raises(tk.DataError, match=r"Retention\.source, row 1: a preference"):
        tk.Retention(source=tk.InMemory(rows=[preference])).check_data(tokenizer, [], CONTEXT)
    long = {"messages": [{"role": "user", "content": "long " * 20}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(tk.DataError, match="no row of at most 16 tokens"):
        tk.Retention(source=tk.InMemory(rows=[long]), max_length=16).check_data(tokenizer, [], CONTEXT)
    for prompts in ((), ("",)):
        with pytest.raises(tk.ConfigError, match="one prompt at least"):
            tk.Samples(prompts=prompts)
    refusing = "{{ raise_exception('no') }}"
    with pytest.raises(tk.DataError, match="no"):
        tk.Samples(prompts=("a",)).check_data(tokenizer, [], tk.Context(model_id="tiny", template=refusing))
