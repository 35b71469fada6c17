"""Methods are compared on the same rows, each in a run that is what it would be alone; what is there is not run again."""

import json
import re
import shutil

import attrs
import pytest

import tunekit as tk
from tunekit.core.comparison import arms, comparison_report
from tunekit.core.comparison.arms import name_of
from tunekit.core.comparison.trials import measured_alike, rows_of, trials_of
from tunekit.core.data import dataset
from tunekit.core.data.batching import RowOrder
from tunekit.core.data.codec import Codec
from tunekit.core.model.base import Base
from tunekit.core.registry import default_registry
from tunekit.core.run import measuring
from tunekit.core.run.gauge import tokens_of_steps

ROWS = [{"prompt": f"repeat {n}", "completion": " ".join([str(n)] * (1 + n % 5))} for n in range(23)]
METHODS = (tk.LoRA(rank=2), tk.IA3())
METHOD_NAMES = ("lora-rank-2", "ia3")


def make(tiny_directory, **changes):
    parts = {
        "model": str(tiny_directory),
        "data": tk.InMemory(rows=ROWS),
        "validation": 0.25,
        "trainer": tk.SFT(batch_size=4, save_every=1),
        "evaluators": (tk.Perplexity(), tk.TokenAccuracy()),
    }
    return tk.Pipeline(**{**parts, **changes})


@pytest.fixture(scope="module")
def compared(tiny_directory, tmp_path_factory):
    """One comparison, for all tests that only look at what came of it."""
    directory = tmp_path_factory.mktemp("compared")
    return tk.compare(make(tiny_directory), METHODS, directory=directory, budget=tk.Steps(3), seeds=(0, 1))


@attrs.frozen(kw_only=True)
class Brittle(tk.LoRA):
    """LoRA that cannot be attached, until it is mended."""

    name = "brittle"
    mended = False

    def attach(self, model, context):
        if not Brittle.mended:
            raise RuntimeError("out of something")
        return super().attach(model, context)


@pytest.fixture(autouse=True)
def brittle():
    Brittle.mended = False
    default_registry.cache_clear()
    tk.register(Brittle)
    yield
    default_registry.cache_clear()


class Interrupts:
    """Stops everything at a step of one arm, as Ctrl-C would."""

    def __init__(self, arm, step):
        self.arm, self.step = arm, step

    @tk.hookimpl
    def tunekit_log(self, run, step):
        if self.arm in str(run.directory) and step == self.step:
            raise KeyboardInterrupt


class Starts:
    """Which runs were started."""

    def __init__(self):
        self.seen = []

    @tk.hookimpl
    def tunekit_run_started(self, run):
        self.seen.append(run.directory.parent.name)


# What each run is -----------------------------------------------------------------------------------------------------


def test_an_arm_is_the_run_that_the_pipeline_makes_by_itself(compared, tiny_directory, tmp_path):
    alone = make(tiny_directory, adapter=METHODS[1], seed=1, trainer=tk.SFT(batch_size=4, save_every=1, max_steps=3))
    run = alone.run(tmp_path / "alone")
    arm = compared.arms[1].runs[1]
    assert (arm.metrics, arm.base_metrics, arm.steps) == (run.metrics, run.base_metrics, 3)
    assert arm.trainable_parameters == run.result["parameters"]["trainable"]
    opened = compared.run("ia3", seed=1)
    assert opened.history == run.history
    assert arm.adapter_bytes == sum(file.stat().st_size for file in (opened.directory / "adapter").iterdir())


def test_the_order_of_the_methods_changes_nothing(compared, tiny_directory, tmp_path):
    turned = tk.compare(make(tiny_directory), METHODS[::-1], directory=tmp_path, budget=tk.Steps(3))
    for one, other in zip(compared.arms, turned.arms[::-1], strict=True):
        assert (one.name, one.runs[0].metrics) == (other.name, other.runs[0].metrics)


def test_all_methods_see_the_same_rows_in_the_same_order_and_seeds_see_others(compared):
    tokens = {
        (arm.name, seed): [line["tokens"] for line in compared.run(arm, seed).history if "tokens" in line]
        for arm in compared.arms
        for seed in compared.seeds
    }
    assert len(tokens["ia3", 0]) == 3
    for seed in compared.seeds:
        assert tokens["lora-rank-2", seed] == tokens["ia3", seed]
    assert tokens["ia3", 0] != tokens["ia3", 1]


@pytest.mark.parametrize("order", ["shuffled", "by-length", "as-given"])
@pytest.mark.parametrize("budget", [1, 150, 700, 2000])
def test_a_budget_of_tokens_is_the_first_step_that_reaches_it(tiny_directory, budget, order):
    trainer = tk.SFT(batch_size=4, order=order)
    codec = Codec(Base(model=str(tiny_directory)).tokenizer())
    train = dataset.load(tk.InMemory(rows=ROWS), 0.25, trainer, codec, None, 1).train

    def seen(steps):
        chosen = RowOrder(lengths=train.lengths, batch_size=4, seed=1, order=order)
        rows = [row for step in range(1, steps + 1) for row in chosen.of_step(step)]
        return sum(len(train[row]["input_ids"]) for row in rows)

    steps = tk.Tokens(budget).steps(trainer, train.lengths, 1)
    assert seen(steps) >= budget
    assert seen(steps - 1) < budget
    assert tk.Tokens(seen(steps)).steps(trainer, train.lengths, 1) == steps
    assert tk.Tokens(seen(steps) + 1).steps(trainer, train.lengths, 1) == steps + 1
    assert sum(tokens for _, tokens in zip(range(steps), tokens_of_steps(trainer, train.lengths, 1))) == seen(steps)  # noqa: B905


def test_without_learning_rates_each_method_has_its_own_whatever_the_trainer_says(compared, tiny_directory, tmp_path):
    assert [arm.learning_rate for arm in compared.arms] == [method.learning_rate for method in METHODS]
    stated = make(tiny_directory, trainer=tk.SFT(batch_size=4, learning_rate=0.5))
    again = tk.compare(stated, METHODS[1:], directory=tmp_path, budget=tk.Steps(1))
    assert again.arms[0].learning_rate == METHODS[1].learning_rate == again.run("ia3").history[-1]["learning_rate"]


def test_each_learning_rate_is_an_arm_of_its_own_and_the_pipelines_own_method_will_do(tiny_directory, tmp_path):
    pipeline = make(tiny_directory, adapter=tk.IA3())
    found = tk.compare(pipeline, directory=tmp_path, budget=tk.Steps(1), learning_rates=[1e-5, 0.1])
    assert [(arm.name, arm.learning_rate) for arm in found.arms] == [("ia3-lr-1e-05", 1e-5), ("ia3-lr-0.1", 0.1)]
    assert [found.run(arm).history[-1]["learning_rate"] for arm in found.arms] == [1e-5, 0.1]


# What is there already ------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_made_again_and_a_new_method_or_seed_is_added(tiny_directory, tmp_path):
    pipeline, starts = make(tiny_directory), Starts()
    options = {"directory": tmp_path, "budget": tk.Steps(1), "observers": [starts]}
    tk.compare(pipeline, METHODS[:1], **options)
    assert starts.seen == ["lora-rank-2"]
    tk.compare(pipeline, METHODS, **options)
    assert starts.seen == ["lora-rank-2", "ia3"]
    whole = tk.compare(pipeline, METHODS, seeds=(0, 7), **options)
    assert starts.seen == ["lora-rank-2", "ia3", "lora-rank-2", "ia3"]
    assert [run.seed for run in whole.arms[0].runs] == [0, 7]
    assert tk.compare(pipeline, METHODS, seeds=(0, 7), **options) == whole == tk.open_comparison(tmp_path)
    assert len(starts.seen) == 4


@pytest.mark.parametrize("step", [0, 2], ids=["before its first checkpoint", "after one"])
def test_an_interrupted_comparison_goes_on_and_ends_as_one_that_was_not(compared, tiny_directory, tmp_path, step):
    options = {"directory": tmp_path, "budget": tk.Steps(3), "seeds": (0, 1)}
    pipeline = make(tiny_directory, trainer=tk.SFT(batch_size=4, save_every=1))
    with pytest.raises(KeyboardInterrupt):
        tk.compare(pipeline, METHODS, observers=[Interrupts("ia3", max(step, 1))], **options)
    stopped = tk.open_comparison(tmp_path)
    assert [arm.runs[0].error for arm in stopped.arms] == [None, "not run yet"]
    assert not stopped.failures
    assert re.search(r"^ia3 +unfinished ", str(stopped), re.MULTILINE)
    assert str(stopped).endswith("\n\n3 runs are not made yet")
    if not step:
        shutil.rmtree(tmp_path / "ia3/seed-0/checkpoints")
    whole = tk.compare(pipeline, METHODS, **options)
    for one, other in zip(whole.arms, compared.arms, strict=True):
        assert [run.metrics for run in one.runs] == [run.metrics for run in other.runs]
    # The time before the interruption was not measured, so the time of the run is not known.
    assert (whole.arms[1].runs[0].seconds is None) == bool(step)
    assert whole.arms[1].runs[1].seconds


def test_runs_of_another_pipeline_other_rows_or_another_base_are_refused(compared, tiny_directory, tmp_path):
    pipeline = make(tiny_directory)
    before = {file: file.stat().st_mtime_ns for file in compared.directory.rglob("*.json")}

    def again(pipeline, budget=3):
        return tk.compare(pipeline, METHODS, directory=compared.directory, budget=tk.Steps(budget), seeds=(0, 1))

    with pytest.raises(tk.ConfigError, match=r"another pipeline; changed: recipe\.trainer\.max_steps: 3 -> 4"):
        again(pipeline, budget=4)
    with pytest.raises(tk.ConfigError, match=r"another pipeline; changed: recipe\.data\.rows"):
        again(make(tiny_directory, data=tk.InMemory(rows=ROWS[1:])))

    # Rows and a base that changed where they lie, so that the recipe is the same.
    rows, model = tmp_path / "rows.jsonl", tmp_path / "model"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    shutil.copytree(tiny_directory, model)
    moved = make(model, data=tk.JsonLines(path=str(rows)))
    options = {"directory": tmp_path / "compared", "budget": tk.Steps(1)}
    tk.compare(moved, METHODS[1:], **options)
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]), encoding="utf-8")
    with pytest.raises(tk.ConfigError, match="other rows than these"):
        tk.compare(moved, METHODS[1:], **options)
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}), encoding="utf-8")
    with pytest.raises(tk.ConfigError, match="of another base"):
        tk.compare(moved, METHODS[1:], **options)
    assert {file: file.stat().st_mtime_ns for file in compared.directory.rglob("*.json")} == before


def test_a_directory_with_something_else_in_it_is_left_alone(tiny_directory, tmp_path):
    (tmp_path / "ia3/seed-0").mkdir(parents=True)
    (tmp_path / "ia3/seed-0/thesis.txt").write_text("the only copy", encoding="utf-8")
    with pytest.raises(tk.RunExists):
        tk.compare(make(tiny_directory), METHODS, directory=tmp_path, budget=tk.Steps(1))
    assert (tmp_path / "ia3/seed-0/thesis.txt").read_text(encoding="utf-8") == "the only copy"


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_a_method_that_fails_stops_no_other_is_shown_and_is_tried_again(tiny_directory, tmp_path):
    pipeline = make(tiny_directory)
    methods = (Brittle(rank=1), tk.LoRA(targets=("nowhere",)), tk.IA3())
    found = tk.compare(pipeline, methods, directory=tmp_path, budget=tk.Steps(1))
    assert [arm.finished for arm in found.arms] == [False, False, True]
    assert found.rows[0]["error"] == "RuntimeError: out of something"
    assert found.rows[0]["perplexity"] is None
    assert "nowhere" in found.rows[1]["error"]
    assert found.best("perplexity").name == "ia3"
    assert re.search(r"^brittle-rank-1 +failed", str(found), re.MULTILINE)
    assert "failed: brittle-rank-1, seed 0: RuntimeError: out of something" in str(found)
    assert tk.open_comparison(tmp_path) == found
    Brittle.mended = True
    again = tk.compare(pipeline, methods, directory=tmp_path, budget=tk.Steps(1))
    assert [arm.finished for arm in again.arms] == [True, False, True]


def test_an_arm_with_a_failed_seed_is_not_the_best_by_those_that_went_well(compared):
    lucky = attrs.evolve(compared.arms[0].runs[0], metrics={"perplexity": 1.0})
    unlucky = tk.ArmRun(seed=1, steps=3, error="TrainingError: the loss is nan")
    arm = attrs.evolve(compared.arms[0], runs=(lucky, unlucky))
    assert attrs.evolve(compared, arms=(arm, compared.arms[1])).best("perplexity").name == "ia3"
    with pytest.raises(tk.ConfigError, match=r"no arm has perplexity: .*the loss is nan"):
        attrs.evolve(compared, arms=(arm,)).best("perplexity")


def test_what_is_wrong_with_every_method_is_raised_before_anything_is_written(tiny_directory, tmp_path):
    for changes in ({"data": tk.JsonLines(path="nowhere.jsonl")}, {"validation": 2.0}, {"model": "./nowhere"}):
        with pytest.raises(tk.ConfigError):
            tk.compare(make(tiny_directory, **changes), METHODS, directory=tmp_path / "new", budget=tk.Steps(1))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"adapters": (tk.IA3(), tk.IA3())}, "compare.adapters: ia3 is given twice"),
        ({"adapters": ("lora",)}, r"compare.adapters\[0\]: expected an adapter method, got 'lora'"),
        ({"budget": 100}, r"compare.budget: expected tk.Steps\(n\), tk.Tokens\(n\), tk.Minutes\(n\) or None, got 100"),
        ({"seeds": ()}, "compare.seeds: must be different numbers"),
        ({"seeds": (1, 1)}, "compare.seeds: must be different numbers"),
        ({"learning_rates": [0.1, 0.1]}, "compare.learning_rates: must be different numbers"),
        ({"learning_rates": [-0.1]}, "SFT.learning_rate: must be"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused(tiny_directory, tmp_path, arguments, problem):
    with pytest.raises(tk.ConfigError, match=problem):
        tk.compare(make(tiny_directory), **{"directory": tmp_path, **arguments})


def test_a_trainer_that_cannot_be_given_a_budget_is_refused(tiny_directory, tmp_path):
    pipeline = make(tiny_directory, trainer=tk.Transformers())
    for arguments in ({"budget": tk.Steps(1)}, {"learning_rates": [0.1]}, {"budget": tk.Tokens(1)}):
        with pytest.raises(tk.ConfigError, match=r"as tk\.SFT"):
            tk.compare(pipeline, METHODS, directory=tmp_path / "new", **arguments)


def test_methods_that_would_not_see_the_same_rows_are_refused(tiny_directory, tmp_path):
    room = Base(model=str(tiny_directory)).config().max_position_embeddings
    rows = [*ROWS, {"prompt": "long", "completion": "x " * room}]
    pipeline = make(tiny_directory, data=tk.InMemory(rows=rows), trainer=tk.SFT(batch_size=4, on_long="truncate"))
    methods = (tk.IA3(), tk.PromptTuning(virtual_tokens=4))
    with pytest.raises(tk.ConfigError, match="not all would see the same rows; set the trainer's max_length"):
        tk.compare(pipeline, methods, directory=tmp_path, budget=tk.Steps(1))


# Names ----------------------------------------------------------------------------------------------------------------


def test_names_of_arms_are_safe_as_directories_and_tell_methods_apart():
    methods = [
        tk.LoRA(),
        tk.LoRA(rank=4),
        tk.LoRA(rank=4, alpha=4.0),
        tk.LoRA(targets="attention"),
        tk.LoRA(targets=("q_proj", "v_proj")),
        tk.LoRA(targets=("q_proj", "V_proj")),
        tk.LoRA(targets="re:../../etc/(passwd|shadow)"),
        tk.LoRA(targets=tuple(f"layers.{n}.self_attn.q_proj" for n in range(40))),
        tk.LoRA(targets=tuple(f"layers.{n}.self_attn.q_proj" for n in range(41))),
        tk.Peft(type="VERA", options={"target_modules": "all-linear"}),
        tk.IA3(),
    ]
    names = [name_of(method) for method in methods]
    assert names[:4] == ["lora", "lora-rank-4", "lora-rank-4-alpha-4.0", "lora-targets-attention"]
    assert len({name.lower() for name in names}) == len(methods)
    for name in names:
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,59}", name)
        assert ".." not in name


# Minutes --------------------------------------------------------------------------------------------------------------


def test_a_budget_of_minutes_gives_each_method_the_steps_it_can_make_in_that_time(
    tiny_directory, tmp_path, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr("tunekit.core.run.gauge.time.monotonic", lambda: now[0])
    for method, seconds in ((tk.LoRA, 0.5), (tk.IA3, 2.0)):

        def after_step(self, model, step, seconds=seconds):
            now[0] += seconds

        monkeypatch.setattr(method, "after_step", after_step)
    rows = [{"prompt": f"row {n:02}", "completion": "as long as all others"} for n in range(20)]
    trainer = tk.SFT(batch_size=4, save_every=1000)
    pipeline = make(tiny_directory, data=tk.InMemory(rows=rows), trainer=trainer)
    options = {"directory": tmp_path, "budget": tk.Minutes(0.1)}
    found = tk.compare(pipeline, METHODS, **options)
    assert not found.failures
    steps = {arm.name: arm.runs[0].steps for arm in found.arms}
    probed = json.loads((tmp_path / "probes.json").read_text(encoding="utf-8"))
    assert probed["lora-rank-2"]["tokens_per_second"] == pytest.approx(4 * probed["ia3"]["tokens_per_second"])
    # 6 seconds are 12 steps of half a second and 3 of two, but for rows at the end of an epoch, which fill no step.
    assert steps["lora-rank-2"] in (12, 13, 14)
    assert steps["ia3"] in (3, 4)
    assert found.arms[0].runs[0].training_seconds == pytest.approx(0.5 * steps["lora-rank-2"])
    assert re.search(rf"^ia3 .* {steps['ia3']} +\d+\.\d s$", str(found), re.MULTILINE)
    assert str(found).startswith("0.1 minutes of training each, seed 0")
    assert not list(tmp_path.glob(".probe*"))

    before = (tmp_path / "probes.json").read_bytes()
    now[0] += 100
    reads, load = [], dataset.load
    monkeypatch.setattr(dataset, "load", lambda *parts: reads.append(parts) or load(*parts))
    assert tk.compare(pipeline, METHODS, **options) == found  # the steps stay as planned, and nothing is run again
    assert (tmp_path / "probes.json").read_bytes() == before
    assert len(reads) == 1, "the rows are read once for both methods, before and after the probes"


def test_a_method_whose_probe_fails_stops_no_other(tiny_directory, tmp_path):
    found = tk.compare(
        make(tiny_directory), (Brittle(rank=1), tk.IA3()), directory=tmp_path, budget=tk.Minutes(0.0001), seeds=(0, 1)
    )
    assert [arm.finished for arm in found.arms] == [False, True]
    assert found.failures == [f"brittle-rank-1, seed {seed}: RuntimeError: out of something" for seed in (0, 1)]
    with pytest.raises(tk.ConfigError, match=r"as tk\.SFT"):
        tk.compare(
            make(tiny_directory, trainer=tk.Transformers()), METHODS, directory=tmp_path / "b", budget=tk.Minutes(1)
        )
    assert not (tmp_path / "b").exists()


# Longer prompts -------------------------------------------------------------------------------------------------------


def test_baselines_are_lines_of_their_own_and_measured_once_for_each_base(tiny_directory, tmp_path, monkeypatch):
    pipeline = make(tiny_directory, baselines=(tk.Prompted(shots=1),))
    asked, measure = [], measuring.measure

    def spied(evaluators, model, tokenizer, rows, context):
        asked.append("prompted" if isinstance(rows, list) else "as they are")
        return measure(evaluators, model, tokenizer, rows, context)

    monkeypatch.setattr(measuring, "measure", spied)
    options = {"directory": tmp_path, "budget": tk.Steps(1)}
    found = tk.compare(pipeline, METHODS, **options)
    assert (asked.count("prompted"), asked.count("as they are")) == (1, 4), "base and tuned of two arms"
    one, other = (found.run(arm) for arm in found.arms)
    assert one.evaluations["prompted-1"] == other.evaluations["prompted-1"]
    assert other.result["intervals"]["metrics"]["nll"]["prompted"]["prompted-1"]["difference"]
    expected = {"prompted-1": one.evaluations["prompted-1"]["metrics"]}
    assert [arm.runs[0].prompted_metrics for arm in found.arms] == [expected, expected]
    assert expected["prompted-1"]["perplexity"] != one.base_metrics["perplexity"]

    lines = [line[:2] for line in found.table()[1]]
    values = [one.base_metrics, expected["prompted-1"], one.metrics, other.metrics]
    shown = [f"{metrics['perplexity']:.4g}" for metrics in values]
    assert lines == [list(pair) for pair in zip(("base", "prompted-1", *METHOD_NAMES), shown, strict=True)]
    assert all(row["prompted-1_perplexity"] == expected["prompted-1"]["perplexity"] for row in found.rows)
    assert tk.open_comparison(tmp_path) == found
    monkeypatch.setattr(comparison_report, "find_spec", lambda name: None)
    assert f'<th scope="row">prompted-1</th><td>{shown[1]}</td>' in found.report().html()

    shutil.rmtree(tmp_path / "ia3")
    again = tk.compare(pipeline, METHODS, **options)
    assert asked.count("prompted") == 1, "the arm that is made again finds it where the other has it"
    assert [arm.runs[0].metrics for arm in again.arms] == [arm.runs[0].metrics for arm in found.arms]
    methods = arms.methods(pipeline, (tk.IA3(), tk.LoHa(), tk.QLoRA()), None)
    budgets = dict.fromkeys((method.name for method in methods), tk.Steps(1))
    ia3, loha, qlora = trials_of(methods, 0, rows_of(methods, 0), budgets, tmp_path)
    assert measured_alike(loha, [loha, ia3]) == (tmp_path / "ia3/seed-0",)
    assert not measured_alike(ia3, [ia3, loha]), "nobody else has"
    assert not measured_alike(qlora, [ia3]), "its base is stored otherwise"
    assert not measured_alike(attrs.evolve(loha, pipeline=attrs.evolve(loha.pipeline, seed=1)), [ia3]), "other shots"
    # In another dtype the base is another, too.
    changed = json.loads((tmp_path / "lora-rank-2/seed-0/environment.json").read_text(encoding="utf-8"))
    changed = json.dumps({**changed, "dtype": "bfloat16"})
    (tmp_path / "lora-rank-2/seed-0/environment.json").write_text(changed, encoding="utf-8")
    shutil.rmtree(tmp_path / "ia3")
    tk.compare(pipeline, METHODS, **options)
    assert asked.count("prompted") == 2


# How it is shown ------------------------------------------------------------------------------------------------------


def test_the_best_arm_is_the_least_or_the_most_as_the_metric_has_it(compared):
    def with_metrics(at, perplexity, accuracy):
        runs = [
            attrs.evolve(run, metrics={"perplexity": perplexity, "token_accuracy": accuracy})
            for run in compared.arms[at].runs
        ]
        return attrs.evolve(compared.arms[at], runs=tuple(runs))

    found = attrs.evolve(compared, arms=(with_metrics(0, 2.0, 0.1), with_metrics(1, 3.0, 0.2)))
    assert found.best("perplexity").name == "lora-rank-2"
    assert found.best("token_accuracy").name == "ia3"
    with pytest.raises(tk.ConfigError, match="did you mean 'perplexity'"):
        found.best("perplexty")


def test_rows_are_means_over_seeds_as_plain_values(compared):
    for row, arm in zip(compared.rows, compared.arms, strict=True):
        one, other = (run.metrics["perplexity"] for run in arm.runs)
        assert row["perplexity"] == pytest.approx((one + other) / 2)
        # Of two values, 12.706 standard errors, each |a - b| / 2.
        assert row["perplexity_interval"] == pytest.approx(12.706 * abs(one - other) / 2)
        assert row["base_perplexity"] == pytest.approx(sum(run.base_metrics["perplexity"] for run in arm.runs) / 2)
        assert row["trainable_parameters"] == arm.runs[0].trainable_parameters
        assert row["peak_memory"] is None  # on the CPU
        assert row["tokens_per_second"] > 0
    assert json.loads(json.dumps(compared.rows)) == compared.rows


def test_the_table_has_the_base_beside_the_arms_and_no_column_of_nothing(compared):
    shown = str(compared)
    assert shown.startswith("3 steps each, seeds 0, 1; mean ± half of its 95 % interval\n")
    header = next(line for line in shown.splitlines() if line.startswith("arm"))
    assert "memory" not in header
    assert re.split(r"  +", header) == [
        "arm",
        *compared.better,
        "learning rate",
        "trainable",
        "tokens/s",
        "adapter",
        "seconds",
    ]
    assert [line.split()[0] for line in shown.splitlines()[4:]] == ["base", "lora-rank-2", "ia3"]
    html = compared._repr_html_()
    assert html.startswith("<p>3 steps each")
    assert "<th>ia3</th>" in html


def test_a_comparison_is_read_again_where_it_was_moved_to(compared, tmp_path):
    shutil.copytree(compared.directory, tmp_path / "moved")
    found = tk.open_comparison(tmp_path / "moved")
    assert attrs.evolve(found, directory=compared.directory) == compared
    assert found.run(found.best("perplexity")).metrics
    with pytest.raises(tk.ConfigError, match="cannot read"):
        tk.open_comparison(tmp_path)


def test_a_run_and_a_comparison_are_plotted(compared, tmp_path):
    pytest.importorskip("matplotlib", reason='pip install "tunekit-sdk[plots]"')
    figure = compared.plot("perplexity")
    (axes,) = figure.axes
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"lora-rank-2", "ia3", "base"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("trainable parameters", "perplexity")
    figure.savefig(tmp_path / "front.png")
    run = compared.run("ia3")
    (line,) = run.plot("loss").axes[0].lines
    assert list(line.get_ydata()) == [logged["loss"] for logged in run.history if "loss" in logged]
    assert list(line.get_xdata()) == [1, 2, 3]
    loss, rate = run.plot(["loss", "learning_rate"]).axes
    assert list(loss.lines[0].get_ydata()) == list(line.get_ydata())
    assert list(rate.lines[0].get_ydata()) == [logged["learning_rate"] for logged in run.history if "loss" in logged]
    assert (rate.get_xlabel(), rate.get_ylabel()) == ("step", "learning rate")
    for wrong in (
        lambda: run.plot("los"),
        lambda: run.plot(["loss", "los"]),
        lambda: compared.plot("perplexity", "second"),
    ):
        with pytest.raises(tk.ConfigError, match="did you mean"):
            wrong()


def test_without_matplotlib_a_plot_says_what_to_install(compared, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(tk.ConfigError, match=r'plots need matplotlib: pip install "tunekit-sdk\[plots\]"'):
        compared.run("ia3").plot("loss")


@pytest.mark.gpu
def test_on_cuda_the_peak_is_that_of_each_run_alone(tiny_directory, tmp_path):
    import torch

    pipeline = make(tiny_directory, device="cuda", dtype="float32")
    hog = torch.ones(2**28, device="cuda")  # a peak of a GiB before the first run, that is none of its own
    del hog
    found = tk.compare(pipeline, METHODS, directory=tmp_path, budget=tk.Steps(2))
    for arm in found.arms:
        assert 2**10 < arm.runs[0].peak_memory < 2**29
    assert "memory" in str(found)
