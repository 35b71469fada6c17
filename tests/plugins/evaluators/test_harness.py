"""Tasks of lm-evaluation-harness are measured on the model in memory; their figures are those of the likelihoods."""

import importlib.util
import json

import pytest
import torch

import tunekit as tk
from tunekit.core.common.random_states import random_states
from tunekit.testing import tiny_model, tiny_tokenizer

CONTEXT = tk.Context(model_id="tiny", device="cpu", seed=2)
QUESTIONS = [
    {"question": "one", "choices": ["uno", "due"], "answer": 0},
    {"question": "two", "choices": ["tre", "due", "sei"], "answer": 1},
    {"question": "six", "choices": ["sei", "uno"], "answer": 0},
]
TASK = """
task: numbers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""

needs_lm_eval = pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm_eval is not installed")


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")  # of the harness and its dependencies
def test_a_task_is_measured_on_the_model_in_memory_and_leaves_it_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "numbers.yaml").write_text(TASK.format(path=tmp_path / "rows.jsonl"))
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    evaluator = tk.Harness(metrics={"numbers/acc": "max"}, task_directory=tmp_path)
    states = repr(random_states())
    found = evaluator.evaluate(model, tokenizer, [], CONTEXT)
    assert model.training
    assert repr(random_states()) == states
    right = []
    for asked in QUESTIONS:  # the other way: the likelihood of each choice after the question, one at a time
        prompt = tokenizer(f"{asked['question']}:", add_special_tokens=False)["input_ids"]
        likelihoods = []
        for choice in asked["choices"]:
            answer = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                log = model.eval()(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            likelihoods.append(sum(log[len(prompt) - 1 + at, token].item() for at, token in enumerate(answer)))
        right.append(float(likelihoods.index(max(likelihoods)) == asked["answer"]))
    assert found == {"numbers/acc": sum(right) / 3}
    assert found.scores == {"numbers/acc": right}
    assert set(found.details) == {"figures", "task_versions", "lm_eval"}
    first = tk.Harness(metrics={"numbers/acc": "max"}, task_directory=tmp_path, max_rows=1, shots=0, chat=True)
    assert first.evaluate(model, tokenizer, [], CONTEXT)["numbers/acc"] in (0, 1)
    with pytest.raises(tk.ConfigError, match=r"no 'numbers/ac'; did you mean 'numbers/acc'"):
        tk.Harness(metrics={"numbers/ac": "max"}, task_directory=tmp_path).evaluate(model, tokenizer, [], CONTEXT)


def test_every_metric_is_declared_and_survives_a_recipe():
    evaluator = tk.Harness(
        metrics={"wikitext/word_perplexity": "min", "arc_easy/acc": "max", "arc_easy/acc_norm": "max"}
    )
    assert evaluator.better == evaluator.metrics
    assert evaluator.tasks == ["wikitext", "arc_easy"]
    pipeline = tk.Pipeline(model=tk.TINY, data=tk.JsonLines(path=tk.ORDERS), evaluators=(evaluator,))
    assert tk.Pipeline.from_dict(pipeline.to_dict()) == pipeline


@pytest.mark.parametrize("metrics", [{}, {"acc": "max"}, {"arc_easy/": "max"}])
def test_a_metric_is_named_with_its_task(metrics):
    with pytest.raises(tk.ConfigError, match=r"Harness\.metrics: must be named as task/metric"):
        tk.Harness(metrics=metrics)


@pytest.mark.skipif(bool(importlib.util.find_spec("lm_eval")), reason="lm_eval is installed")
def test_without_the_harness_a_run_is_refused_with_the_line_that_installs_it():
    pipeline = tk.Pipeline(
        model=tk.TINY, data=tk.JsonLines(path=tk.ORDERS), evaluators=(tk.Harness(metrics={"a/acc": "max"}),)
    )
    with pytest.raises(tk.ConfigError, match="pip install lm_eval"):
        pipeline.check()
