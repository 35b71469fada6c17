"""Every built-in component passes the conformance kit; one that is not listed here makes the last test fail."""

from pathlib import Path

import pytest

import tunekit as tk
from tunekit.core.interfaces import INTERFACES
from tunekit.core.registry import Registry
from tunekit.testing import parametrize
from tunekit.testing.harness import ROWS

TABLE = Path(__file__).with_name("table") / "train.csv"
REPEATED = [{"prompt": f"number {number % 30}", "completion": "a"} for number in range(60)]
SOURCES = (
    tk.Table(path=TABLE),
    tk.TextFiles(path=TABLE, pattern=".*,.*,.*"),
    tk.Hub(id=str(TABLE.parent)),
    tk.Mixture(sources=(tk.JsonLines(path=tk.ORDERS), tk.InMemory(rows=REPEATED)), weights=(3.0, 1.0), caps=(20, 40)),
    tk.Filtered(source=tk.InMemory(rows=REPEATED), min_length=2, matches="[0-8]", unique=True),
    tk.Split(source=tk.InMemory(rows=REPEATED), train=0.6, validation=0.2, test=0.2),
    tk.InMemory(rows=[{"text": "a text"}, {"text": "another"}]),
    tk.JsonLines(path=tk.ORDERS),
)
ADAPTERS = (
    tk.LoRA(rank=4),
    tk.QLoRA(rank=4),
    tk.LoRA(rank=4, variant="dora", dropout=0.1),
    tk.LoRA(rank=4, variant="rslora", targets="attention", layers=(1,)),
    tk.IA3(),
    tk.LoHa(rank=4),
    tk.LoKr(rank=2, dropout=0.1),
    tk.Full(),
    tk.LastLayers(count=1),
    tk.Bottleneck(size=4),
    tk.AdaLoRA(initial_rank=6, target_rank=2, interval=2),
    tk.PromptTuning(virtual_tokens=4),
    tk.PrefixTuning(virtual_tokens=4),
    tk.Peft(type="P_TUNING", options={"num_virtual_tokens": 4, "encoder_hidden_size": 8}),
)
QUANTIZERS = (tk.NF4(), tk.NF4(double_quantization=False), tk.Int8())
COUNTED = tuple(
    {"messages": [{"role": "user", "content": name}, {"role": "assistant", "content": f"a b c {number}"}]}
    for number, name in enumerate(("one", "two", "three", "four", "five", "six", "seven"), start=1)
)
"""Answers of four words, of which the last is a number."""
ANSWER_EVALUATORS = (
    tk.TokenF1(max_new_tokens=12),
    tk.NumericAnswer(max_new_tokens=12),
    tk.Bleu(max_new_tokens=12),
    tk.Chrf(max_new_tokens=12),
    tk.Rouge(max_new_tokens=12),
    tk.Classification(method="generation", max_new_tokens=12),
)
TRAINERS = (
    tk.SFT(epochs=2, batch_size=4),
    tk.Transformers(
        arguments={"num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    ),
)
EVALUATORS = (
    tk.Perplexity(),
    tk.Perplexity(window=12, stride=5),
    tk.TokenAccuracy(),
    tk.ExactMatch(max_new_tokens=12),
    tk.Classification(),
    tk.Samples(prompts=("one", "two"), max_new_tokens=4),
)


@parametrize(*SOURCES, *ADAPTERS, *QUANTIZERS, *TRAINERS, *EVALUATORS)
def test_conformance(component, check):
    check(component)


RETENTION = tk.Retention(source=tk.InMemory(rows=ROWS))


@parametrize(RETENTION, expected_failures={"points_the_right_way": "forgetting is 0 outside of a run"})
def test_conformance_of_what_compares_with_the_base_of_a_run(component, check):
    check(component)


WAY_BACK = [{"prompt": row["messages"][1]["content"], "completion": row["messages"][0]["content"]} for row in ROWS]
REVERSE = tk.ReverseFacts(forward=tk.InMemory(rows=ROWS), reverse=tk.InMemory(rows=WAY_BACK), max_new_tokens=12)
CODE = tk.PassAtK(
    source=tk.InMemory(rows=[{"prompt": "def add(a, b):\n", "test": "assert add(1, 2) == 3"}]),
    allow_execution=True,
    max_new_tokens=4,
)


HARNESS = tk.Harness(metrics={"arc_easy/acc": "max"})
"""Its own tests measure a task that is on the disk: this one's rows are on the Hub."""
SPECIAL = (RETENTION, REVERSE, CODE, HARNESS)


@parametrize(REVERSE, expected_failures={"points_the_right_way": "nobody knows the way back: the reversal curse"})
def test_conformance_of_what_asks_in_both_directions(component, check):
    check(component)


@parametrize(CODE, expected_failures={"points_the_right_way": "the rows teach no code"})
def test_conformance_of_what_runs_code(component, check):
    check(component)


@parametrize(*ANSWER_EVALUATORS, rows=COUNTED)
def test_conformance_on_answers_of_several_words(component, check):
    check(component)


def without_schemes(cases):
    """The checks but those over each scheme of quantization, which are made on the first architecture."""
    names, found = cases.args
    return pytest.mark.parametrize(names, [case for case in found if not case.id.endswith("on_what_it_supports")])


@without_schemes(
    parametrize(
        tk.LoRA(rank=4, bias="all"),
        tk.IA3(),
        tk.Full(),
        tk.LastLayers(count=1),
        tk.Bottleneck(size=4, placement="pfeiffer", activation="silu"),
        tk.PromptTuning(),
        tk.PrefixTuning(),
        tk.Perplexity(),
        architecture="gpt2",
    )
)
def test_conformance_on_another_architecture(component, check):
    check(component)


PISSA = {
    "starts_as_the_base_in_bfloat16": "what the singular values leave of a bfloat16 weight is rounded",
    "base_is_frozen": "attaching takes the largest singular values out of the base weights",
    "saves_what_it_trained": "it is saved as plain LoRA of twice the rank; tests/plugins/adapters/test_lora.py loads it",
}


HRA = {"starts_as_the_base_in_bfloat16": "its reflections cancel out in pairs, up to rounding"}


@parametrize(tk.Peft(type="HRA", options={"target_modules": "all-linear"}), expected_failures=HRA)
def test_conformance_of_reflections(component, check):
    check(component)


@parametrize(tk.LoRA(rank=4, variant="pissa"), expected_failures=PISSA)
def test_conformance_of_what_changes_its_base_on_purpose(component, check):
    check(component)


@without_schemes(parametrize(tk.LoRA(rank=4, variant="pissa"), expected_failures=PISSA, architecture="gpt2"))
def test_conformance_of_the_same_on_another_architecture(component, check):
    check(component)


def test_every_builtin_is_listed_here():
    registry = Registry(environment={"TUNEKIT_DISABLE_PLUGINS": ",".join(_distributions())})
    offered = {(kind, name) for kind in INTERFACES for name in registry.names(kind)}
    listed = {
        (component.kind, component.name)
        for component in (
            *SOURCES,
            *ADAPTERS,
            *QUANTIZERS,
            *TRAINERS,
            *EVALUATORS,
            *ANSWER_EVALUATORS,
            *SPECIAL,
        )
    }
    assert offered - listed == set(), "list it above, so that it is checked"


def _distributions():
    """What is installed besides tunekit-sdk; its own tests are its own matter."""
    return {plugin.distribution for plugin in Registry().plugins()} - {"tunekit-sdk"}
