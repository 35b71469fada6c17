"""Each check of the conformance kit passes a healthy component, catches a broken one, and says what to change."""

import subprocess
import sys

import broken_components as broken
import pytest
from heavy_component import Heavy

import tunekit as tk
from tunekit.testing import check_component, checks, checks_for, parametrize

# (the broken component, the check that catches it, words of its advice); `fault=""` makes the component healthy.
OF_ALL = [
    (broken.Thawed(), "is_frozen", "decorate the class with @attrs.frozen"),
    (broken.WithList(), "is_frozen", "annotate a tuple"),
    (broken.Undecorated(), "is_frozen", "decorate Undecorated itself"),
    (broken.Positional(), "is_keyword_only", "kw_only=True"),
    (broken.CamelCase(), "is_named", "write it in kebab-case, such as 'camel-case'"),
    (broken.Taken(), "is_named", "give your class another name"),
    (broken.Undescribed(), "is_documented", "under `Args:`, as `size: ...`"),
    (broken.Growing(), "survives_a_recipe", "without converters that lose something"),
    (broken.Lenient(), "refuses_unknown_fields", r"take no \*\*kwargs"),
    (broken.NeverNone(), "defaults_to_none_where_it_may_be_none", "None must be its default"),
    (broken.Unequal(), "survives_copies", "do not set eq=False"),
    (broken.local_class(), "survives_copies", "define it at the top of a module"),
    (Heavy(), "is_light", "imports numpy: move those imports into the methods"),
    (broken.Reading(), "makes_no_input_or_output", "read where it is used"),
    (broken.EagerNorms(), "says_what_to_install", "import rich only in the methods that run later"),
]
FAULTS = [
    (broken.Words, "list", "names_its_splits", "return a tuple"),
    (broken.Words, "no train", "names_its_splits", '"train" must be one of them'),
    (broken.Words, "any split", "refuses_unknown_splits", "raise ConfigError"),
    (broken.Words, "no rows", "repeats_itself", "raise DataError if there are none"),
    (broken.Words, "no place", "examines_what_it_loads", "yield `file:line` or `row N`"),
    (broken.Words, "other", "examines_what_it_loads", "let one of them call the other"),
    (broken.Words, "new rows", "repeats_itself", "begin anew on every call"),
    (broken.Words, "columns", "yields_examples", "to_example"),
    (broken.Words, "tokens", "yields_examples", "yield a str"),
    (broken.Words, "blank", "yields_examples", "is empty"),
    (broken.Words, "roles", "yields_examples", "must end with the assistant"),
    (broken.Words, "set", "yields_plain_values", "yield plain values"),
    (broken.Words, "memory", "is_stateless", "keep what belongs to one run in the model"),
    (broken.Norms, "moved", "starts_as_the_base", "start from zero"),
    (broken.Norms, "more logits", "starts_as_the_base", "cut off those of tokens"),
    (broken.Norms, "says it moves", "starts_as_the_base", "leave starts_as_base at True"),
    (broken.Norms, "rounded lengths", "starts_as_the_base_in_bfloat16", "and round once"),
    (broken.Norms, "nothing", "base_is_frozen", "nothing is trainable"),
    (broken.Norms, "all and more", "base_is_frozen", r"call model.requires_grad_\(False\) first"),
    (broken.Norms, "writes", "base_is_frozen", "never write into base weights"),
    (broken.Norms, "values", "attaches_to_an_empty_model", "decide by names and shapes"),
    (broken.Norms, "unused", "gradients_arrive", r"no gradient arrives at \['more'\]"),
    (broken.Norms, "vector", "extra_loss_is_a_scalar", "a tensor of no dimensions"),
    (broken.Norms, "evaluations count", "evaluation_keeps_gradients", "keep no state between forward passes"),
    (broken.Norms, "computed once", "checkpointing_keeps_gradients", "must give the same both times"),
    (broken.Norms, "coarse", "trains_in_bfloat16", r"adds \['more'\] in less than float32"),
    (broken.Norms, "widens", "trains_in_bfloat16", "in the dtype of those it is given"),
    (broken.Norms, "widens the end", "trains_in_bfloat16", "return the base's dtype"),
    (broken.Norms, "wrong sign", "learns", "or the wrong sign"),
    (broken.Norms, "noise", "is_deterministic", "draw from torch's global generator"),
    (broken.Norms, "stops", "takes_every_step", r"after_step\(6\) of 20 raised ValueError: no more"),
    (broken.Norms, "writes late", "takes_every_step", r"after_step\(5\) changed the frozen"),
    (broken.Norms, "forgets", "resumes_exactly", "return from train_state all that the coming steps depend on"),
    (broken.Norms, "objects", "resumes_exactly", "more than JSON values and tensors"),
    (broken.Norms, "whole model", "saves_what_it_trained", "save what was trained, nothing else"),
    (broken.Norms, "half", "saves_what_it_trained", "save every trained tensor"),
    (broken.Norms, "pickle", "saves_what_it_trained", "write tensors as safetensors"),
    (broken.Norms, "wrong merge", "merges", "away from the trained model's"),
    (broken.Norms, "same model", "merges", "away from the trained model's|merge into a copy"),
    (broken.Norms, "module left", "merges", "take the adapter's modules out"),
    (
        broken.Norms,
        "blind to bits",
        "trains_on_what_it_supports",
        "scheme int8, .* base_is_frozen fails: .*nothing is trainable",
    ),
    (
        broken.Norms,
        "knows bits only",
        "is_saved_and_merged_on_what_it_supports",
        "scheme int8, .* is_saved_and_merged fails: .*away from the trained model's",
    ),
    (broken.Norms, "memory", "is_stateless", "keep what belongs to one run in the model"),
    (broken.Norms, "shared", "is_stateless", "keep what belongs to a model in it"),
    (broken.Loop, "from zero", "takes_the_planned_steps", "counted from 1"),
    (broken.Loop, "plans more", "takes_the_planned_steps", "plan the steps as `fit` takes them"),
    (broken.Loop, "says more", "takes_the_planned_steps", "the result says 3 steps"),
    (broken.Loop, "slot before", "keeps_the_slot", r"call it after optimizer.step\(\)"),
    (broken.Loop, "slot without gradients", "keeps_the_slot", r"call it before optimizer.zero_grad\(\)"),
    (broken.Loop, "trains all", "trains_only_what_is_trainable", "give the optimizer only what is trainable"),
    (broken.Loop, "unfreezes", "leaves_requires_grad_and_device", "fit changed requires_grad"),
    (broken.Loop, "silent", "logs_finite_numbers", r"call run.log\(step"),
    (broken.Loop, "empty lines", "logs_finite_numbers", "a line without metrics"),
    (broken.Loop, "own order", "is_deterministic", "order the rows by context.seed"),
    (broken.Loop, "drops", "uses_every_row", r"rows \[5, 6, 7\] of 7 were never in a batch"),
    (broken.Loop, "extra each part", "adds_the_extra_loss_once_a_step", "not per forward pass"),
    (broken.Loop, "extra ignored", "adds_the_extra_loss_once_a_step", "add it to the loss"),
    (broken.Loop, "means of means", "splits_rows_freely", "by the supervised tokens of the whole step"),
    (broken.Loop, "memory", "is_stateless", "keep what belongs to one run in the model"),
    (broken.Surprise, "another name", "returns_what_it_declares", "`better` declares"),
    (broken.Surprise, "tensor", "returns_what_it_declares", r"return a Python number \(.item\(\)"),
    (broken.Surprise, "not finite", "returns_what_it_declares", "return a finite number"),
    (broken.Surprise, "not JSON", "keeps_what_it_says", "details cannot be written"),
    (broken.Surprise, "scores of tokens", "keeps_what_it_says", "give scores to means over rows alone"),
    (broken.Surprise, "unknown scores", "keeps_what_it_says", "no metric of `better`"),
    (broken.Surprise, "mode", "leaves_the_model_alone", "left modules in another mode"),
    (broken.Surprise, "writes", "leaves_the_model_alone", "an evaluator only looks"),
    (broken.Surprise, "gradients", "leaves_the_model_alone", "other gradients than before"),
    (broken.Surprise, "freezes", "leaves_the_model_alone", "changed requires_grad"),
    (broken.Surprise, "draws", "leaves_the_model_alone", "draw from a generator of its own"),
    (broken.Surprise, "random", "repeats_itself", "fix the seed"),
    (broken.Surprise, "first tokens", "does_not_mind_the_order", "weigh every token, or every row, alike"),
    (broken.Surprise, "direction", "points_the_right_way", "turn the direction"),
    (broken.Surprise, "memory", "is_stateless", "keep what belongs to one run in the model"),
    (broken.Int8, "same dict", "returns_fresh_load_kwargs", "make a new one"),
    (broken.Int8, "own dtype", "returns_fresh_load_kwargs", "these are the pipeline's to choose"),
    (broken.Int8, "does nothing", "stores_fewer_bytes", "nothing is gained"),
    (broken.Int8, "wrong scale", "predicts_nearly_the_same", "check the scales"),
    (broken.Int8, "does nothing", "gives_weights_back", "no linear layer is quantized"),
    (broken.Int8, "claims all", "gives_weights_back", "is_quantized is wrong about"),
    (broken.Int8, "half", "gives_weights_back", "give torch.float32"),
    (broken.Int8, "transposed", "gives_weights_back", "give .out_features, in_features."),
    (broken.Int8, "doubled", "gives_weights_back", "away from the weight that was quantized"),
    (broken.Int8, "memory", "is_stateless", "keep what belongs to one run in the model"),
]
BROKEN = [
    *OF_ALL,
    *((cls(fault=fault), check, advice) for cls, fault, check, advice in FAULTS),
    (broken.BadScheme(), "names_its_scheme", "write it in lower case"),
]
HEALTHY = (broken.Words(), broken.Norms(), broken.Loop(), broken.Surprise(), broken.Int8())


@pytest.mark.parametrize(("component", "name", "advice"), BROKEN)
def test_a_broken_component_is_caught_and_told_what_to_change(component, name, advice):
    (check,) = [check for check in checks_for(component) if check.name == name]
    with pytest.raises(AssertionError, match=advice):
        check(component)


@parametrize(*HEALTHY)
def test_a_healthy_component_passes(component, check):
    check(component)


def test_every_check_is_shown_to_catch_something():
    shown = {name for _, name, _ in OF_ALL} | {(component.kind, name) for component, name, _ in BROKEN}
    of_all = {function.__name__ for function in checks.OF_ALL}
    of_kind = {(kind, function.__name__) for kind, functions in checks.OF_KIND.items() for function in functions}
    assert (of_all | of_kind) - shown == set(), "show it a broken component, above"


def test_records_say_what_became_of_each_check():
    component = tk.InMemory(rows=[])
    records = {
        record.check: record for record in check_component(component, expected_failures={"yields_examples": "x"})
    }
    assert len(records) == len(checks_for(component))
    assert records["is_frozen"].status == "passed"
    assert records["repeats_itself"].status == "failed"
    assert records["repeats_itself"].reason == "DataError: InMemory: there are no rows"
    assert records["yields_examples"].status == "expected"
    assert records["yields_examples"].reason == "x"


def test_an_expected_failure_that_passes_is_a_failure():
    records = check_component(broken.Words(), expected_failures={"is_named": "by design"})
    assert [record.check for record in records if record.status == "failed"] == ["is_named"]
    marks = {
        case.id: case.marks for case in parametrize(broken.Words(), expected_failures={"is_named": "y"}).mark.args[1]
    }
    (mark,) = marks["words-is_named"]
    assert mark.name == "xfail"
    assert mark.kwargs == {"reason": "y", "strict": True}
    assert not marks["words-is_frozen"]


def test_expecting_the_failure_of_an_unknown_check_is_an_error():
    for use in (check_component, parametrize):
        with pytest.raises(tk.ConfigError, match="no check is named 'is_nmaed'; did you mean 'is_named'"):
            use(broken.Words(), expected_failures={"is_nmaed": "a slip"})


def test_what_needs_a_missing_package_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(broken.Words, "requires", ("absent_package",))
    records = {record.check: record for record in check_component(broken.Words())}
    assert records["is_frozen"].status == "passed"
    assert records["repeats_itself"].status == "skipped"
    assert records["repeats_itself"].reason == "absent_package is not installed"


def test_components_of_one_name_are_told_apart_in_test_ids():
    cases = parametrize(tk.LoRA(rank=4), tk.LoRA(rank=4, variant="dora"), tk.Perplexity()).mark.args[1]
    labels = dict.fromkeys(case.id.rpartition("-")[0] for case in cases)
    assert list(labels) == ["lora-variant=standard", "lora-variant=dora", "perplexity"]


def test_checks_neither_see_nor_move_the_callers_random_state():
    import torch

    torch.manual_seed(7)
    before = torch.get_rng_state()
    (check,) = [check for check in checks_for(broken.Norms()) if check.name == "starts_as_the_base"]
    check(broken.Norms())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_kit_imports_neither_pytest_nor_torch():
    code = "import sys, tunekit.testing; print({'pytest', 'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
