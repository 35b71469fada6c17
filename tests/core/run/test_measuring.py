"""An evaluation of a run asks each row once, is kept with what stands behind it, and says how sure its means are."""

import attrs
import pytest

import tunekit as tk
from tunekit.core.data.codec import Codec
from tunekit.core.evaluation import answers
from tunekit.core.evaluation.statistics import mean_interval, paired_difference
from tunekit.core.run import measuring
from tunekit.testing import tiny_model, tiny_tokenizer

CONTEXT = tk.Context(model_id="tiny", device="cpu")
PAIRS = [("one", "uno"), ("two", "due"), ("three", "tre"), ("four", "quattro")]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def rows(tokenizer):
    codec = Codec(tokenizer)
    return [
        codec.encode({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
        for q, a in PAIRS
    ]


@attrs.frozen(kw_only=True)
class Length(tk.AnswerEvaluator):
    """Letters of the answers."""

    name = "length"
    better = {"letters": "min"}  # noqa: RUF012

    def compare(self, answers, context):
        letters = [len(answer.given) for answer in answers]
        return tk.Measured(
            {"letters": sum(letters) / len(letters)}, details={"expected": [a.expected for a in answers]}
        )


def test_no_row_is_asked_twice_in_one_evaluation(tokenizer, rows, monkeypatch):
    asked = []

    def generate(model, tokenizer, prompts, max_new_tokens):
        asked.extend((tokenizer.decode(prompt), max_new_tokens) for prompt in prompts)
        return [[70 + max_new_tokens] * max_new_tokens for _ in prompts]

    monkeypatch.setattr(answers, "generate", generate)
    evaluators = [Length(max_new_tokens=4, max_rows=2), tk.ExactMatch(max_new_tokens=4), tk.Perplexity()]
    found = measuring.measure(evaluators, tiny_model(), tokenizer, rows, CONTEXT)
    assert len(asked) == len(set(asked)) == 4
    assert (found["letters"], found["exact_match"]) == (4, 0)
    assert found.details == {"length": {"expected": ["uno", "due"]}}
    measuring.measure(evaluators, tiny_model(), tokenizer, rows, CONTEXT)
    assert len(asked) == 8, "of another evaluation, whose model may be another, nothing is remembered"
    measuring.measure([tk.ExactMatch(max_new_tokens=5)], tiny_model(), tokenizer, rows, CONTEXT)
    assert len(asked) == 12


def test_details_of_two_of_one_kind_are_both_kept(tokenizer, rows):
    found = measuring.measure([Length(), Length(max_rows=1)], tiny_model(), tokenizer, rows, CONTEXT)
    assert {name: len(kept["expected"]) for name, kept in found.details.items()} == {"length": 4, "length-2": 1}


def test_a_run_keeps_its_evaluations_and_the_intervals_of_their_means(tmp_path):
    data = tk.InMemory(rows=[{"prompt": question, "completion": answer} for question, answer in PAIRS * 6])
    pipeline = tk.Pipeline(
        model=tk.TINY,
        data=data,
        validation=tk.InMemory(rows=[{"prompt": question, "completion": answer} for question, answer in PAIRS]),
        evaluators=(tk.Perplexity(), tk.TokenAccuracy(), Length(max_new_tokens=2)),
        trainer=tk.SFT(max_steps=4, batch_size=4, evaluate_every=2, learning_rate=1e-2),
        seed=3,
    )
    run = pipeline.run(tmp_path / "run")
    assert list(run.evaluations) == ["base", "step-000002", "step-000004", "tuned"]
    base, tuned = run.evaluations["base"], run.evaluations["tuned"]
    assert base["metrics"] == run.base_metrics
    assert tuned["metrics"] == run.metrics == run.evaluations["step-000004"]["metrics"]
    assert tuned["details"]["length"]["expected"] == [answer for _, answer in PAIRS]
    intervals = run.result["intervals"]
    assert intervals["seed"] == 3
    assert set(intervals["metrics"]) == {"nll", "token_accuracy"}
    nll, weights = intervals["metrics"]["nll"], tuned["weights"]["nll"]
    assert nll["tuned"] == list(mean_interval(tuned["scores"]["nll"], weights, seed=3))
    assert nll["tuned"][0] < run.metrics["nll"] < nll["tuned"][1]
    gain = paired_difference(base["scores"]["nll"], tuned["scores"]["nll"], weights, seed=3)
    assert (nll["difference"], nll["p"]) == ([gain.low, gain.high], gain.p)
    assert gain.value == pytest.approx(run.metrics["nll"] - run.base_metrics["nll"])
    logged = [line for line in run.history if "validation/nll" in line]
    assert [run.evaluations[f"step-{line['step']:06d}"]["metrics"]["nll"] for line in logged] == [
        line["validation/nll"] for line in logged
    ]


def test_an_evaluator_knows_the_metrics_of_the_base_and_the_template(tmp_path):
    template = "{% for m in messages %}{{ m['role'] + '\\n' + m['content'] + eos_token }}{% endfor %}{{ 'assistant\\n' if add_generation_prompt }}"
    data = tk.InMemory(rows=[{"prompt": question, "completion": answer} for question, answer in PAIRS])
    pipeline = tk.Pipeline(
        model=tk.TINY,
        data=data,
        validation=data,
        template=template,
        evaluators=(tk.Perplexity(), Facts()),
        trainer=tk.SFT(max_steps=1),
    )
    run = pipeline.run(tmp_path / "run")
    assert run.evaluations["base"]["details"]["facts"] == {"base": None, "template": template}
    assert run.evaluations["tuned"]["details"]["facts"] == {"base": dict(run.base_metrics), "template": template}


@attrs.frozen(kw_only=True)
class Facts(tk.Evaluator):
    """What the context says."""

    name = "facts"
    better = {}  # noqa: RUF012

    def evaluate(self, model, tokenizer, data, context):
        base = None if context.base_metrics is None else dict(context.base_metrics)
        return tk.Measured({}, details={"base": base, "template": context.template})
