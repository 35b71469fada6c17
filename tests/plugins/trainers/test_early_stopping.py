"""A run stops early where its metric gets no better or what it could do before is lost; as it would have, resumed."""

import shutil

import attrs
import pytest
import torch
from safetensors.torch import load_file

import tunekit as tk
from tunekit.core.data import dataset
from tunekit.core.registry import default_registry
from tunekit.core.run.checkpoint import checksums, newest, trained_parameters
from tunekit.core.run.files import create, history
from tunekit.core.run.observers import Observers
from tunekit.core.run.run_log import RunLog
from tunekit.plugins.trainers.so_far import SoFar
from tunekit.testing import tiny_model, tiny_tokenizer

CONTEXT = tk.Context(model_id="tiny", device="cpu", seed=3, better={"nll": "min", "accuracy": "max"})
BEST = {"max_steps": 12, "batch_size": 3, "evaluate_every": 2, "keep_best": "nll"}
TALKS = [
    {"messages": [{"role": "user", "content": f"row {n}"}, {"role": "assistant", "content": "ab" * n}]}
    for n in range(1, 8)
]


def fit(trainer, directory, curve, resumed=None, model=None, **facts):
    """Train with the evaluation at step n giving curve[n]; the steps evaluated are those asked for."""
    if resumed is None:
        create(directory)
    model, steps = model or tiny_model(), []
    if resumed:
        resumed.load_parameters(model)
    log = RunLog(directory=directory, observers=Observers(default_registry()), resumed=resumed)
    found = trainer.fit(
        model,
        tiny_tokenizer(),
        [trainer.encode(row, tk.Codec(tiny_tokenizer())) for row in TALKS],
        after_step=lambda model, step: steps.append(step),
        extra_loss=lambda model: None,
        validate=lambda: curve[steps[-1]],
        run=log,
        context=attrs.evolve(CONTEXT, **facts),
    )
    return found, checksums(model), steps


def nlls(*values):
    return {2 * number: {"nll": value} for number, value in enumerate(values, start=1)}


@pytest.mark.parametrize(
    ("patience", "curve", "stopped"),
    [
        (1, (3.0, 2.0, 2.5, 1.0, 1.0, 1.0), 6),
        (2, (3.0, 2.0, 2.5, 2.0, 1.0, 1.0), 8),
        (2, (3.0, 2.0, 2.5, 1.0, 1.1, 0.9), None),
        (5, (1.0, 2.0, 2.0, 2.0, 2.0, 2.0), None),
    ],
)
def test_patience_counts_evaluations_in_a_row_that_were_no_better(tmp_path, patience, curve, stopped):
    found, _, steps = fit(tk.SFT(**BEST, patience=patience), tmp_path / "run", nlls(*curve))
    assert found.steps == steps[-1] == (stopped or 12)
    log = (tmp_path / "run" / "log.txt").read_text()
    if stopped is None:
        assert found.notes == {}
        assert "stopped early" not in log
    else:
        assert f"stopped early after step {stopped}: {patience} evaluations brought no better nll than 2" in log
        assert found.notes["stopped"] in log
        assert [line["step"] for line in history(tmp_path / "run") if "stopped" in line] == [stopped]


def test_a_metric_beyond_its_limit_stops_the_run_in_the_direction_that_is_worse(tmp_path):
    trainer = tk.SFT(max_steps=6, evaluate_every=1, stop_beyond={"accuracy": 0.5, "nll": 3})
    values = {1: (3.0, 0.9), 2: (2.0, 0.5), 3: (2.0, 0.4), 4: (9.0, 0.9)}
    curve = {step: {"nll": nll, "accuracy": accuracy} for step, (nll, accuracy) in values.items()}
    found, _, _ = fit(trainer, tmp_path / "accuracy", curve)
    assert (found.steps, "accuracy is 0.4, beyond the limit of 0.5" in found.notes["stopped"]) == (3, True)
    curve[3]["accuracy"] = 0.6
    found, _, _ = fit(trainer, tmp_path / "nll", curve)
    assert (found.steps, "nll is 9, beyond the limit of 3" in found.notes["stopped"]) == (4, True)


def test_the_run_is_not_stopped_before_its_method_can_be(tmp_path):
    curve = nlls(1.0, 2.0, 2.0, 2.0, 2.0, 2.0)
    found, _, _ = fit(tk.SFT(**BEST, patience=1), tmp_path / "run", curve, earliest_end=7)
    assert found.steps == 8


def test_a_resumed_run_stops_where_it_would_have_and_never_goes_on(tmp_path):
    trainer = tk.SFT(**BEST, patience=2, save_every=1, keep=20)
    curve = nlls(3.0, 1.0, 2.0, 2.0, 0.5, 0.5)
    whole, parameters, _ = fit(trainer, tmp_path / "whole", curve)
    assert whole.steps == 8
    for step in (5, 6, 7):
        place = tmp_path / f"from-{step}"
        create(place)
        shutil.copytree(tmp_path / "whole/checkpoints" / f"step-00000{step}", place / f"checkpoints/step-00000{step}")
        found, again, _ = fit(trainer, place, curve, newest(place / "checkpoints"))
        assert (found, again) == (whole, parameters), step
    # A signal may come in the very step: its checkpoint is of a run that has nothing left to do.
    last = newest(place / "checkpoints")
    state = {**last.state["trainer"], "so_far": {**last.state["trainer"]["so_far"]}}
    so_far = SoFar(**state["so_far"])
    assert so_far.stops(attrs.evolve(trainer, patience=1), last.step, {}, CONTEXT)
    stopped = attrs.evolve(last, state={**last.state, "trainer": {**state, "so_far": attrs.asdict(so_far)}})
    found, _, steps = fit(trainer, place, curve, stopped)
    assert (found.steps, steps) == (7, [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tuned_model_is_that_of_the_best_evaluation_to_the_last_bit_resumed_as_well(tmp_path, dtype):
    trainer = tk.SFT(**BEST, patience=2, save_every=1, keep=20, restore_best=True)
    curve, held = nlls(3.0, 1.0, 2.0, 2.0), getattr(torch, dtype)
    model = tiny_model().to(held)
    whole, parameters, steps = fit(trainer, tmp_path / "whole", curve, model=model, dtype=dtype)
    assert (steps[-1], whole.steps, whole.metrics["best_step"]) == (8, 8, 4)
    assert whole.notes["restored"] == "the tuned model is that of step 4, with the best nll, 1"
    assert whole.notes["restored"] in (tmp_path / "whole/log.txt").read_text()
    checkpoints = tmp_path / "whole/checkpoints"
    best, later = (load_file(checkpoints / f"step-00000{step}/parameters.safetensors") for step in (4, 7))
    tuned = trained_parameters(model)
    assert tuned.keys() == best.keys()
    assert all(torch.equal(tuned[name], best[name]) for name in best)
    assert not all(torch.equal(later[name], best[name]) for name in best)

    for steps in ([3], [4], [4, 7], [7]):
        place = tmp_path / f"from-{steps}"
        create(place)
        for step in steps:
            name = f"step-00000{step}"
            shutil.copytree(checkpoints / name, place / "checkpoints" / name)
        resumed = newest(place / "checkpoints")
        if steps == [7]:
            with pytest.raises(tk.TrainingError, match="step-000004 is not as it was written, or not there"):
                fit(trainer, place, curve, resumed, model=tiny_model().to(held), dtype=dtype)
        else:
            found, again, _ = fit(trainer, place, curve, resumed, model=tiny_model().to(held), dtype=dtype)
            assert (found, again) == (whole, parameters), steps


def test_the_last_step_stays_where_it_is_the_best(tmp_path):
    trainer = tk.SFT(**{**BEST, "max_steps": 4}, restore_best=True)
    found, parameters, _ = fit(trainer, tmp_path / "asked", nlls(3.0, 2.0))
    assert found.notes == {}
    assert parameters == fit(attrs.evolve(trainer, restore_best=False), tmp_path / "not", nlls(3.0, 2.0))[1]


@pytest.fixture
def contrary():
    """An evaluator to which the worse is the better, so that the best comes first."""

    @attrs.frozen(kw_only=True)
    class Contrary(tk.Perplexity):
        """Perplexity, the more the better."""

        name = "contrary"
        better = dict.fromkeys(tk.Perplexity.better, "max")

    default_registry.cache_clear()
    tk.register(Contrary)
    yield Contrary
    default_registry.cache_clear()


@pytest.mark.parametrize(
    "adapter", [tk.LoRA(rank=2), tk.AdaLoRA(initial_rank=4, target_rank=2, interval=1)], ids=lambda a: a.name
)
def test_what_is_measured_saved_and_used_is_the_best_that_the_method_can_save(
    tiny_directory, tmp_path, contrary, adapter
):
    rows = tk.InMemory(rows=[{"prompt": f"row {n}", "completion": "ab" * n} for n in range(1, 5)])
    pipeline = tk.Pipeline(
        model=str(tiny_directory),
        data=rows,
        validation=rows,
        adapter=adapter,
        trainer=tk.SFT(
            max_steps=8, batch_size=4, evaluate_every=2, keep_best="nll", restore_best=True, learning_rate=0.01
        ),
        evaluators=(contrary(),),
    )
    run = pipeline.run(tmp_path / "run")
    best = 2 if adapter.name == "lora" else 6
    found = run.result["training"]
    assert (found["steps"], found["best_step"]) == (8, best), "AdaLoRA's ranks are cut down at step 6"
    assert run.metrics == run.evaluations[f"step-00000{best}"]["metrics"] != run.evaluations["step-000008"]["metrics"]
    assert run.metrics["nll"] == found["best_nll"]
    assert found["restored"] == f"the tuned model is that of step {best}, with the best nll, {found['best_nll']:.6g}"
    again = tk.open_run(tmp_path / "run")._model(tuned=True)
    held_out = dataset.load(rows, rows, pipeline.trainer, again.codec, None, 0).validation
    found = contrary().evaluate(again.model, again.codec.tokenizer, held_out, again.context)
    assert found["nll"] == pytest.approx(run.metrics["nll"], rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"patience": 2}, r"SFT\.patience: needs keep_best"),
        ({"restore_best": True}, r"SFT\.restore_best: needs keep_best"),
        ({"stop_beyond": {"nll": 1.0}}, r"SFT\.stop_beyond: needs evaluate_every"),
        ({"stop_beyond": {"nl": 1.0}, "evaluate_every": 1}, r"SFT\.stop_beyond: no evaluator returns 'nl'"),
    ],
)
def test_what_cannot_stop_it_is_refused_before_any_work(fields, says):
    with pytest.raises(tk.ConfigError, match=says):
        tk.SFT(**fields).check(CONTEXT)


@pytest.mark.parametrize(
    "adapter", [tk.LoRA(rank=2), tk.AdaLoRA(initial_rank=4, target_rank=2, interval=1)], ids=lambda a: a.name
)
def test_a_pipeline_stops_on_forgetting_and_its_result_says_why(tmp_path, adapter):
    rows = [{"prompt": "one", "completion": "uno uno uno"}, {"prompt": "six", "completion": "sei sei sei"}]
    pipeline = tk.Pipeline(
        model=tk.TINY,
        data=tk.InMemory(rows=rows * 4),
        validation=tk.InMemory(rows=rows),
        adapter=adapter,
        evaluators=(tk.Retention(source=tk.InMemory(rows=[{"text": "The grass is green."}])),),
        trainer=tk.SFT(max_steps=20, evaluate_every=2, learning_rate=5e-2, stop_beyond={"forgetting": 0.01}),
    )
    run = tk.Pipeline.from_dict(pipeline.to_dict()).run(tmp_path / "run")
    steps = run.result["training"]["steps"]
    assert steps == (2 if adapter.name == "lora" else 14), "AdaLoRA's budget is spent at step 14"
    assert (
        f"stopped early after step {steps}: forgetting is {run.metrics['forgetting']:.6g}"
        in run.result["training"]["stopped"]
    )
    assert run.metrics["forgetting"] > 0.01
    assert any("stopped early" in line for line in (tmp_path / "run/log.txt").read_text().splitlines())
    assert tk.open_run(tmp_path / "run").generate("one", max_new_tokens=3) == run.generate("one", max_new_tokens=3)
