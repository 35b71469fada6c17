"""A whole fine-tune: what is checked before, planned, written, and kept as it was."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import torch
from safetensors.torch import load_file

import tunekit as tk
from tunekit.core.run.checkpoint import trained_parameters

ROWS = [{"prompt": f"repeat {n}", "completion": f"{n} {n}"} for n in range(14)]


def make(tiny_directory, **changes):
    parts = {
        "model": str(tiny_directory),
        "data": tk.InMemory(rows=ROWS),
        "validation": 0.25,
        "adapter": tk.LoRA(rank=4, dropout=0.1),
        "trainer": tk.SFT(epochs=2, batch_size=4, learning_rate=0.01, save_every=2, keep=9),
        "evaluators": (tk.Perplexity(), tk.TokenAccuracy(), tk.ExactMatch(max_new_tokens=4)),
    }
    return tk.Pipeline(**{**parts, **changes})


@pytest.fixture(scope="module")
def finished(tiny_directory, tmp_path_factory):
    """One run, for all tests that only look at what came of it."""
    directory = tmp_path_factory.mktemp("runs") / "first"
    pipeline = make(tiny_directory)
    return pipeline, pipeline.run(directory)


@pytest.fixture(scope="module")
def in_bfloat16(tiny_directory, tmp_path_factory):
    """The same over a base in bfloat16."""
    pipeline = make(tiny_directory, dtype="bfloat16")
    return pipeline, pipeline.run(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(params=["finished", "in_bfloat16"], ids=["float32", "bfloat16"])
def promised(request):
    """Both of them: what is promised holds in either."""
    return request.getfixturevalue(request.param)


# What it refuses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": "/no/such/directory"}, "model: there is no directory '/no/such/directory'"),
        ({"model": "./here"}, "model: there is no directory './here'"),
        ({"model": __file__}, "is a file; name the model's directory"),
        ({"model": str(Path(__file__).parent)}, "holds no config.json"),
        ({"model": "tunekit:tny"}, "no embedded asset; did you mean 'tunekit:tiny'"),
        ({"data": tk.JsonLines(path="/no/file.jsonl")}, r"JsonLines.path: the file /no/file.jsonl does not exist"),
        ({"validation": 1.0}, r"Pipeline.validation: a share must be in \[0, 1\)"),
        ({"dtype": "float16", "device": "cpu"}, "Pipeline.dtype: float16 does not train on the CPU"),
        ({"device": "gpu"}, "Pipeline.device: must be 'cpu', 'cuda' or 'cuda:1', got 'gpu'"),
        ({"evaluators": (tk.Perplexity(), tk.Perplexity())}, "two evaluators return 'bits_per_byte'"),
    ],
)
def test_what_cannot_work_is_refused_by_check_with_one_clear_error(tiny_directory, changes, problem):
    with pytest.raises(tk.ConfigError, match=problem):
        make(tiny_directory, **changes).check()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"adapter": [tk.LoRA()]}, r"Pipeline.adapter: expected AdapterMethod, got list"),
        ({"adapter": tk.LoRA}, r"that is the class, write LoRA\(...\)"),
        ({"trainer": tk.LoRA()}, r"Pipeline.trainer: expected Trainer, got LoRA"),
        ({"data": ROWS}, r"Pipeline.data: expected DataSource, got list"),
        ({"seed": "0"}, r"Pipeline.seed: expected int, got str '0'"),
        ({"dtype": "fp32"}, "'float32' or 'bfloat16' or 'float16' or None"),
    ],
)
def test_a_part_of_the_wrong_type_is_refused_when_the_pipeline_is_made(tiny_directory, changes, problem):
    with pytest.raises(tk.ConfigError, match=problem):
        make(tiny_directory, **changes)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (tk.InMemory(rows=[]), "there are no rows"),
        (tk.InMemory(rows=[{"a": "b"}]), "no known schema has the columns 'a'"),
        (tk.InMemory(rows=[*ROWS, {"prompt": "x"}]), r"row 15: missing \(completion\)"),
        (tk.InMemory(rows=ROWS[:1]), "at least two different rows"),
        (tk.InMemory(rows=[{"text": f"text {n}"} for n in range(9)]), "ExactMatch needs rows with a prompt"),
    ],
)
def test_bad_data_stops_a_run_before_weights_are_loaded_and_leaves_no_directory(
    tiny_directory, tmp_path, data, problem, monkeypatch
):
    monkeypatch.setattr("tunekit.core.model.base.Base.load", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(tk.DataError, match=problem):
        make(tiny_directory, data=data).run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_scheme_that_the_method_does_not_support_is_refused(tiny_directory):
    @attrs.frozen(kw_only=True)
    class Ternary(tk.Quantizer):
        """Stores weights as signs."""

        name = "ternary"
        scheme = "ternary"

        def load_kwargs(self, context):
            return {}

        def dequantize(self, module):
            return module.weight

    with pytest.raises(tk.ConfigError, match=r"lora cannot train on a ternary base; it supports int8, nf4"):
        make(tiny_directory, quantizer=Ternary()).check()


def test_a_missing_requirement_is_one_error_with_the_install_line(tiny_directory, monkeypatch):
    monkeypatch.setattr(tk.Perplexity, "requires", ("nowhere_to_be_found",))
    with pytest.raises(tk.ConfigError, match="perplexity needs nowhere_to_be_found: pip install nowhere_to_be_found"):
        make(tiny_directory).check()


def test_a_run_directory_is_never_overwritten(finished, tiny_directory, tmp_path):
    pipeline, run = finished
    before = {path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()}
    with pytest.raises(tk.RunExists, match=r"holds a finished run; read it with tunekit\.open_run"):
        pipeline.run(run.directory)
    assert before == {path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()}
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(tk.RunExists, match="is not empty; choose another directory"):
        pipeline.run(tmp_path)


def test_weights_that_are_missing_from_the_file_are_refused_not_made_up(tiny_directory, tmp_path):
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_directory.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(tk.ConfigError, match=r"lacks 1 weights of its architecture: model.layers.1.mlp.up_proj.weight"):
        make(tiny_directory, model=str(broken)).run(tmp_path / "run")


# What it plans -------------------------------------------------------------------------------------------------------


def test_the_plan_is_what_happens(finished):
    pipeline, run = finished
    plan = pipeline.plan()
    assert plan.steps == run.result["training"]["steps"] == run.history[-1]["step"]
    assert (plan.rows, plan.validation_rows) == (run.result["rows"]["train"], run.result["rows"]["validation"])
    assert (plan.tokens, plan.supervised_tokens) == (run.result["tokens"]["train"], run.result["tokens"]["supervised"])
    assert plan.trainable_parameters == run.result["parameters"]["trainable"]
    assert plan.total_parameters == run.result["parameters"]["total"]
    assert sum(line["tokens"] for line in run.history) == 2 * plan.supervised_tokens, "two epochs were logged"


def test_the_held_out_rows_can_be_looked_at(finished):
    pipeline, run = finished
    train, held_out = pipeline.rows()
    assert (len(train), len(held_out)) == (run.result["rows"]["train"], run.result["rows"]["validation"])
    assert not [row for row in held_out if row in train]


def test_the_plan_counts_lora_by_its_formula_without_loading_weights(tiny_directory, monkeypatch):
    monkeypatch.setattr("tunekit.core.model.base.Base.load", lambda *_, **__: pytest.fail("weights were loaded"))
    plan = make(tiny_directory).plan()
    # Two layers: q and o 32->32, k and v 32->16, gate and up 32->64, down 64->32; rank 4 adds rank * (in + out).
    assert plan.trainable_parameters == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    text = str(plan)
    assert "optimizer steps" in text
    assert f"{plan.trainable_parameters:,} of {plan.total_parameters:,}" in text


def test_a_learning_rate_that_is_left_open_is_the_methods_own_in_the_plan_and_in_the_run(tiny_directory, tmp_path):
    @attrs.frozen(kw_only=True)
    class Slow(tk.LoRA):
        """LoRA with a learning rate of its own."""

        name = "slow"
        learning_rate = 7e-5

    for adapter, learning_rate, expected in ((tk.LoRA(), None, 2e-4), (Slow(), None, 7e-5), (Slow(), 0.5, 0.5)):
        sft = tk.SFT(max_steps=1, warmup=0, learning_rate=learning_rate)
        stated = {"learning_rate": learning_rate} if learning_rate else {}
        theirs = tk.Transformers(arguments={"max_steps": 1, "lr_scheduler_type": "constant", **stated})
        for trainer in (sft, theirs):
            pipeline = make(tiny_directory, adapter=adapter, trainer=trainer, evaluators=())
            assert pipeline.plan().learning_rate == expected
            shown = [line.split() for line in str(pipeline.plan()).splitlines()]
            assert ["learning", "rate", f"{expected:g}", "at", "most"] in shown
            run = pipeline.run(tmp_path / f"{adapter.name}-{trainer.name}-{expected}")
            assert run.history[0]["learning_rate"] == expected


# What it writes ------------------------------------------------------------------------------------------------------


def test_everything_is_in_the_run_directory(finished):
    pipeline, run = finished
    names = {path.name for path in run.directory.iterdir()}
    assert {
        "recipe.toml",
        "environment.json",
        "metrics.jsonl",
        "result.json",
        "adapter",
        "checkpoints",
        "log.txt",
    } <= names
    assert tk.load(run.directory / "recipe.toml") == pipeline
    assert {path.name for path in (run.directory / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tunekit.json",
    }
    log = (run.directory / "log.txt").read_text()
    assert "started" in log
    assert "finished" in log


def test_the_environment_says_what_made_the_run_and_holds_no_secret(tiny_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret0123456789")
    make(tiny_directory, trainer=tk.SFT(max_steps=1)).run(tmp_path / "run")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["python"] == sys.version.split()[0]
    assert (environment["device"], environment["dtype"], environment["seed"]) == ("cpu", "float32", 0)
    assert {"name": "builtin", "distribution": "tunekit-sdk", "status": "loaded"}.items() <= environment["plugins"][
        0
    ].items()
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]


def test_an_adapter_says_what_it_needs_to_be_used(finished):
    pipeline, run = finished
    stated = json.loads((run.directory / "adapter" / "tunekit.json").read_text())
    assert stated["component"] == "adapter/lora"
    assert stated["distribution"] == "tunekit-sdk"
    assert stated["adapter"] == pipeline.to_dict()["adapter"]
    assert (stated["base"]["model"], stated["base"]["revision"]) == (Path(pipeline.model).name, None)
    assert "<|im_start|>" in stated["template"]


# What it promises ----------------------------------------------------------------------------------------------------


def test_the_base_is_measured_before_training_by_the_same_code(promised, tmp_path):
    pipeline, run = promised
    still = tk.SFT(max_steps=1, learning_rate=1e-30)
    untrained = attrs.evolve(pipeline, trainer=still).run(tmp_path / "same")
    assert untrained.base_metrics == run.base_metrics
    assert untrained.metrics == untrained.base_metrics
    assert run.metrics["perplexity"] < run.base_metrics["perplexity"]
    assert set(run.metrics) == {"perplexity", "nll", "bits_per_byte", "token_accuracy", "exact_match"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_adapter_is_the_base_before_the_first_step_and_base_weights_stay_bit_for_bit(
    dtype, tiny_directory, tmp_path
):
    from transformers import AutoModelForCausalLM

    seen = {}

    @attrs.frozen(kw_only=True)
    class Watched(tk.LoRA):
        """LoRA that keeps what passes through its hands."""

        name = "watched"

        def attach(self, model, context):
            with torch.no_grad():
                seen["base"] = model(torch.arange(5, 25)[None]).logits
            wrapped = super().attach(model, context).eval()
            with torch.no_grad():
                seen["start"] = wrapped(torch.arange(5, 25)[None]).logits
            seen["model"] = wrapped
            return wrapped

    make(tiny_directory, adapter=Watched(rank=4), dtype=dtype).run(tmp_path / "run")
    assert torch.equal(seen["start"], seen["base"])
    before = AutoModelForCausalLM.from_pretrained(tiny_directory, dtype=dtype).state_dict()
    trained = trained_parameters(seen["model"])
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in seen["model"].state_dict().items()
        if name not in trained
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all("lora_" in name for name in trained)


def test_the_adapter_file_is_pefts_own(promised, tiny_directory):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, run = promised
    base = AutoModelForCausalLM.from_pretrained(tiny_directory, dtype=run._model(tuned=False).model.dtype)
    theirs = PeftModel.from_pretrained(base, run.directory / "adapter").eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        difference = (theirs(ids).logits - run._model(tuned=True).model(ids).logits).abs().max()
    assert difference < 1e-6


def test_the_same_seed_gives_the_same_run_and_another_seed_another(promised, tmp_path):
    pipeline, run = promised
    again = pipeline.run(tmp_path / "again")
    assert again.history == run.history
    adapter = "adapter/adapter_model.safetensors"
    assert (again.directory / adapter).read_bytes() == (run.directory / adapter).read_bytes()
    other = attrs.evolve(pipeline, seed=1).run(tmp_path / "other")
    assert (other.directory / adapter).read_bytes() != (run.directory / adapter).read_bytes()


@pytest.mark.parametrize("beside", [False, True], ids=["saved in the step", "saved beside training"])
def test_observers_of_one_run_are_told_of_it(tiny_directory, tmp_path, beside):
    events = []

    class Observer:
        @tk.hookimpl
        def tunekit_run_started(self, steps):
            events.append(("started", steps))

        @tk.hookimpl
        def tunekit_log(self, step):
            events.append(("log", step))

        @tk.hookimpl
        def tunekit_saved(self, step, directory):
            assert (directory / "checkpoint.json").is_file()  # its last file: the checkpoint is whole
            events.append(("saved", step, directory.name))

        @tk.hookimpl
        def tunekit_run_finished(self, error):
            events.append(("finished", error))

    pipeline = make(tiny_directory, trainer=tk.SFT(max_steps=3, save_every=2, background_saving=beside))
    pipeline.run(tmp_path / "run", observers=[Observer()])
    saved = ("saved", 2, "step-000002")
    told = events.index(saved)
    # What is written beside training is told of once it is whole: after its own step, and before the end.
    assert told == 3 or (beside and told == 4)
    assert events[:told] + events[told + 1 :] == [
        ("started", 3),
        ("log", 1),
        ("log", 2),
        ("log", 3),
        ("finished", None),
    ]


# Going on and coming back --------------------------------------------------------------------------------------------


class Stop(Exception):
    """Raised by a test in the middle of a run."""


class StopsAt:
    def __init__(self, step):
        self.step = step

    def __call__(self, model, step):
        if step == self.step:
            raise Stop


@pytest.mark.parametrize("step", [3, 4, 5])
def test_an_interrupted_run_goes_on_to_the_same_end_bit_for_bit(promised, tmp_path, step, monkeypatch):
    pipeline, run = promised
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(tk.LoRA, "after_step", lambda self, model, at: StopsAt(step)(model, at))
        with pytest.raises(Stop):
            pipeline.run(directory)
    with pytest.raises(tk.RunExists, match="unfinished run; go on with run"):
        pipeline.run(directory)
    with pytest.raises(tk.ConfigError, match="is not finished"):
        tk.open_run(directory)
    resumed = pipeline.run(directory, resume=True)
    assert resumed.history == run.history
    assert resumed.metrics == run.metrics
    assert resumed.base_metrics == run.base_metrics
    adapter = "adapter/adapter_model.safetensors"
    assert (directory / adapter).read_bytes() == (run.directory / adapter).read_bytes()


def test_a_changed_pipeline_cannot_go_on_with_the_run(tiny_directory, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tk.LoRA, "after_step", lambda self, model, at: StopsAt(3)(model, at))
        with pytest.raises(Stop):
            make(tiny_directory).run(tmp_path / "run")
    changed = make(tiny_directory, adapter=tk.LoRA(rank=8, dropout=0.1), seed=4)
    logged = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(tk.ConfigError, match=r"recipe.adapter.rank: 4 -> 8\n +recipe.seed: 0 -> 4"):
        changed.run(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == logged, "a refused resume changes nothing"


def test_changed_rows_cannot_go_on_with_the_run(tiny_directory, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pipeline = make(tiny_directory, data=tk.JsonLines(path=file))
    with monkeypatch.context() as patch:
        patch.setattr(tk.LoRA, "after_step", lambda self, model, at: StopsAt(3)(model, at))
        with pytest.raises(Stop):
            pipeline.run(tmp_path / "run")
    file.write_text(file.read_text().replace("repeat 3", "repeat 33"))
    with pytest.raises(tk.ConfigError, match=r"fingerprint of the rows: '\w{12}' -> '\w{12}'"):
        pipeline.run(tmp_path / "run", resume=True)


def test_there_must_be_something_to_resume(tiny_directory, finished, tmp_path):
    with pytest.raises(tk.ConfigError, match="there is no run to resume"):
        make(tiny_directory).run(tmp_path / "nothing", resume=True)
    pipeline, run = finished
    with pytest.raises(tk.ConfigError, match="is finished; read it with"):
        pipeline.run(run.directory, resume=True)


def test_finished_runs_are_opened_in_another_process_and_answer_the_same(finished, in_bfloat16):
    runs = [run for _, run in (finished, in_bfloat16)]
    answers = [[run.generate("repeat 3", max_new_tokens=6, tuned=tuned) for tuned in (True, False)] for run in runs]
    here = [[dict(run.metrics), len(run.history), answer] for run, answer in zip(runs, answers, strict=True)]
    script = (
        "import json, sys, tunekit as tk; "
        "print(json.dumps([[dict(run.metrics), len(run.history), "
        "[run.generate('repeat 3', max_new_tokens=6, tuned=tuned) for tuned in (True, False)]] "
        "for run in map(tk.open_run, sys.argv[1:])]))"
    )
    command = [sys.executable, "-c", script, *(str(run.directory) for run in runs)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == here


def test_a_conversation_is_answered_as_its_last_question(finished):
    _, run = finished
    assert run.generate([{"role": "user", "content": "repeat 3"}], max_new_tokens=6) == run.generate(
        "repeat 3", max_new_tokens=6
    )


def test_the_export_is_a_plain_model_that_answers_the_same(promised, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pipeline, run = promised
    directory = run.export(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "repeat 3"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    live = run._model(tuned=True)
    assert ids[0].tolist() == live.codec.prompt("repeat 3")
    assert model.dtype == live.model.dtype
    with torch.no_grad():
        # The one rounds the sum of base and update, the other what comes out of each of them.
        exact = copy.deepcopy(live.model).float()(ids).logits
        away = [(found(ids).logits - exact).norm() / exact.norm() for found in (model, live.model)]
    assert max(away) < (1e-6 if pipeline.dtype is None else 2 * 2**-8)
    assert not any("lora" in name for name in model.state_dict())
    assert set(live.codec.stop_ids) <= set(model.generation_config.eos_token_id)
    with pytest.raises(tk.RunExists, match="is not empty"):
        run.export(directory)


def test_a_run_shows_base_and_tuned_side_by_side(finished):
    _, run = finished
    lines = str(run).splitlines()
    assert lines[0].split() == ["metric", "base", "tuned"]
    shown = [f"{metrics['perplexity']:.4g}" for metrics in (run.base_metrics, run.metrics)]
    assert ["perplexity", *shown] in [line.split() for line in lines]


def test_it_learns_one_answer_by_heart_and_stops_by_itself(tiny_directory, tmp_path):
    pipeline = make(
        tiny_directory,
        data=tk.InMemory(rows=[{"prompt": "who?", "completion": "me."}]),
        validation=0.0,
        adapter=tk.LoRA(rank=8),
        trainer=tk.SFT(max_steps=60, batch_size=1, learning_rate=0.02),
    )
    run = pipeline.run(tmp_path / "run")
    assert run.generate("who?", max_new_tokens=50) == "me."
    assert run.metrics == {}


def test_transformers_trains_the_same_pipeline(tiny_directory, tmp_path):
    trainer = tk.Transformers(arguments={"max_steps": 6, "learning_rate": 0.01, "per_device_train_batch_size": 4})
    run = make(tiny_directory, trainer=trainer).run(tmp_path / "run")
    assert run.result["training"]["steps"] == 6
    assert run.metrics["nll"] < run.base_metrics["nll"]
    assert tk.open_run(run.directory).generate("repeat 3", max_new_tokens=4) == run.generate(
        "repeat 3", max_new_tokens=4
    )


def test_a_run_in_which_nothing_moved_fails(tiny_directory, tmp_path):
    still = tk.SFT(max_steps=1, warmup=0.9)  # its one step is in the warm-up, at a rate of 0
    with pytest.raises(
        tk.TrainingError, match="none of the 28 trained parameters moved: the learning rate is 0 or too"
    ):
        make(tiny_directory, trainer=still).run(tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    # In float32 so small a change is rounded away, of whatever stands around it.
    rate = {"learning_rate": 1e-300, "optimizer": "sgd"}
    small = make(tiny_directory, adapter=tk.Full(), dtype="bfloat16", trainer=tk.SFT(max_steps=2, **rate))
    with pytest.raises(tk.TrainingError, match="parameters moved"):
        small.run(tmp_path / "small")


def test_the_plan_shows_the_size_of_a_checkpoint(tiny_directory, tmp_path):
    for number, changes in enumerate(
        ({}, {"adapter": tk.Full(), "dtype": "bfloat16"}, {"adapter": tk.QLoRA(rank=4), "dtype": "bfloat16"})
    ):
        pipeline = make(tiny_directory, trainer=tk.SFT(max_steps=3, save_every=2, learning_rate=0.01), **changes)
        run = pipeline.run(tmp_path / str(number))
        (place,) = (run.directory / "checkpoints").iterdir()
        written = sum(path.stat().st_size for path in place.iterdir())
        planned = pipeline.plan().checkpoint
        assert planned < written < planned + 96 * 1024, "random states and names come on top"
        shown = [line.split() for line in str(pipeline.plan()).splitlines()]
        assert ["a", "checkpoint", f"{planned / 2**20:.1f}", "MiB", "on", "disk"] in shown


def test_a_run_is_opened_in_the_dtype_it_was_made_in(tiny_directory, tmp_path, monkeypatch):
    make(tiny_directory, trainer=tk.SFT(max_steps=1)).run(tmp_path / "run")
    monkeypatch.setenv("TUNEKIT_CPU_DTYPE", "bfloat16")  # on another machine
    assert tk.open_run(tmp_path / "run")._model(tuned=True).model.dtype == torch.float32
