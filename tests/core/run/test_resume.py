"""A run goes on as the run that it was, or is refused with every change named; or forced, with every change recorded."""

import json
import platform
import shutil

import attrs
import pytest

import tunekit as tk
from tunekit.core.registry import Registry
from tunekit.core.run import checkpoint, files, resume
from tunekit.testing import tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"repeat {n}", "completion": f"{n} {n}"} for n in range(12)]
OTHER = "{% for message in messages %}{{ message['content'] + '<|im_end|>' }}{% endfor %}"


def make(model, **changes):
    parts = {
        "data": tk.InMemory(rows=ROWS),
        "adapter": tk.LoRA(rank=2),
        "trainer": tk.SFT(max_steps=6, batch_size=3, learning_rate=0.01, save_every=2),
    }
    return tk.Pipeline(model=str(model), **{**parts, **changes})


class StopsWhenSaved:
    @tk.hookimpl
    def tunekit_saved(self, step):
        if step == 4:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model directory of our own, to be changed by a test and changed back."""
    directory = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def kept(base, tmp_path_factory):
    """A run that was stopped at step 4."""
    directory = tmp_path_factory.mktemp("kept") / "run"
    with pytest.raises(KeyboardInterrupt):
        make(base).run(directory, observers=[StopsWhenSaved()])
    return directory


@pytest.fixture
def stopped(kept, tmp_path):
    """A copy of it."""
    return shutil.copytree(kept, tmp_path / "run")


def content(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


CHANGES = {
    "adapter": ({"adapter": tk.LoRA(rank=4)}, r"recipe\.adapter\.rank: 2 -> 4"),
    "method": ({"adapter": tk.IA3()}, r"recipe\.adapter\.use: 'lora' -> 'ia3'"),
    "quantizer": ({"quantizer": tk.Int8()}, r"recipe\.quantizer: None -> \{'use': 'int8'"),
    "seed": ({"seed": 1}, r"recipe\.seed: 0 -> 1"),
    "learning rate": (
        {"trainer": tk.SFT(max_steps=6, batch_size=3, learning_rate=0.1, save_every=2)},
        r"recipe\.trainer\.learning_rate: 0\.01 -> 0\.1",
    ),
    "batch": (
        {"trainer": tk.SFT(max_steps=6, batch_size=2, learning_rate=0.01, save_every=2)},
        r"recipe\.trainer\.batch_size: 3 -> 2",
    ),
    "trainer": ({"trainer": tk.Transformers()}, r"recipe\.trainer\.use: 'sft' -> 'transformers'"),
    "data": (
        {"data": tk.InMemory(rows=[*ROWS[1:], ROWS[0]])},
        r"(?s)recipe\.data\.rows.*fingerprint of the rows: '\w{12}' -> '\w{12}'",
    ),
    "template": ({"template": OTHER}, r"(?s)recipe\.template: None -> .*\n  template: .*"),
    "evaluators": ({"evaluators": ()}, r"recipe\.evaluators: \[\{.*\}\] -> \[\]"),
    "dtype": ({"dtype": "bfloat16"}, r"(?s)recipe\.dtype: None -> 'bfloat16'.*\n  dtype: 'float32' -> 'bfloat16'"),
}


@pytest.mark.parametrize(("changes", "says"), CHANGES.values(), ids=CHANGES)
def test_a_changed_field_is_refused_by_name_with_both_values_and_the_run_stays_as_it_is(base, stopped, changes, says):
    before = content(stopped)
    with pytest.raises(tk.ConfigError, match=says):
        make(base, **changes).run(stopped, resume=True)
    assert content(stopped) == before


def test_other_weights_under_the_same_name_are_refused(base, stopped):
    kept = (base / "model.safetensors").read_bytes()
    try:
        tiny_model(seed=1).save_pretrained(base)
        with pytest.raises(
            tk.ConfigError, match=r"of another base than .*: the configuration is the same, the weights"
        ):
            make(base).run(stopped, resume=True)
    finally:
        (base / "model.safetensors").write_bytes(kept)


def test_another_version_of_a_component_is_refused_and_another_library_noted(base, stopped, monkeypatch):
    true = Registry.provenance
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "provenance", lambda self, component: {**true(self, component), "version": "9.9"})
        with pytest.raises(
            tk.ConfigError, match=r"components\.adapter/lora: 'tunekit-sdk [\d.]+' -> 'tunekit-sdk 9\.9'"
        ):
            make(base).run(stopped, resume=True)
    environment = json.loads((stopped / files.ENVIRONMENT).read_text())
    environment["packages"]["torch"] = "2.0.0"
    files.write_json(stopped / files.ENVIRONMENT, environment)
    run = make(base).run(stopped, resume=True)
    (resumed,) = run.result["resumes"]
    assert (resumed["step"], resumed["changed"]) == (4, [])
    assert [line.split(" -> ")[0] for line in resumed["libraries"]] == ["torch: '2.0.0'"]
    assert "torch: '2.0.0' -> " in (stopped / files.LOG).read_text()


def test_a_forced_resume_goes_on_with_the_new_fields_and_records_them(base, stopped):
    faster = tk.SFT(max_steps=8, batch_size=3, learning_rate=0.1, save_every=2, schedule="constant", warmup=0)
    changed = make(base, trainer=faster, data=tk.InMemory(rows=ROWS[:-1]))
    with pytest.raises(KeyboardInterrupt):
        changed.run(stopped, resume="force", observers=[StopsAt(6)])
    changed_again = changed.run(stopped, resume=True)
    first, second = changed_again.result["resumes"]
    named = [line.split(":")[0] for line in first["changed"]]
    expected = ["max_steps", "learning_rate", "schedule", "warmup"]
    assert set(named) == {
        "recipe.data.rows",
        "fingerprint of the rows",
        *(f"recipe.trainer.{name}" for name in expected),
    }
    assert (first["step"], second) == (4, {"step": 6, "changed": [], "libraries": [], "moved": []})
    log = (stopped / files.LOG).read_text()
    assert "forced, though changed: recipe.trainer.learning_rate: 0.01 -> 0.1" in log
    assert [line["learning_rate"] for line in changed_again.history][4:] == [0.1] * 4, "the new one counts"
    assert tk.load(stopped / files.RECIPE) == changed
    assert tk.open_run(stopped).metrics == changed_again.metrics


class StopsAt:
    def __init__(self, step):
        self.step = step

    @tk.hookimpl
    def tunekit_saved(self, step):
        if step == self.step:
            raise KeyboardInterrupt


def test_what_does_not_fit_cannot_be_forced(base, stopped):
    with pytest.raises(
        tk.TrainingError, match=r"holds other parameters than this pipeline trains.*\[2, 64\] there and"
    ):
        make(base, adapter=tk.LoRA(rank=4)).run(stopped, resume="force")
    make(base).run(stopped, resume=True)  # what was there is as it was


def test_a_run_that_is_past_the_plan_is_refused(base, stopped):
    trainer = tk.SFT(max_steps=3, batch_size=3, learning_rate=0.01, save_every=2)
    with pytest.raises(tk.ConfigError, match="step-000004 is of step 4, and 3 steps are planned"):
        make(base, trainer=trainer).run(stopped, resume="force")


def test_a_run_that_stopped_before_its_first_checkpoint_begins_again(base, tmp_path, stopped):
    whole = make(base).run(tmp_path / "whole")
    shutil.rmtree(stopped / files.CHECKPOINTS)
    (stopped / files.CHECKPOINTS).mkdir()
    with pytest.raises(
        tk.RunExists, match=r"stopped before its first checkpoint; begin it again with run.*resume=True"
    ):
        make(base).run(stopped)
    with pytest.raises(tk.ConfigError, match=r"recipe\.seed: 0 -> 1"):
        make(base, seed=1).run(stopped, resume=True)
    resumed = make(base).run(stopped, resume=True)
    assert resumed.history == whole.history
    assert resumed.base_metrics == whole.base_metrics
    assert "began again: there was no checkpoint" in (stopped / files.LOG).read_text()


@pytest.mark.parametrize("left", [(), ("checkpoints",), ("checkpoints", "run.lock")], ids=str)
@pytest.mark.parametrize("resumed", [True, False])
def test_a_run_that_was_killed_before_it_wrote_anything_begins_again(base, tmp_path, left, resumed):
    (tmp_path / "run").mkdir()
    for name in left:
        place = tmp_path / "run" / name
        if name == "run.lock":
            place.write_text(json.dumps({"host": platform.node(), "pid": 1, "started": 1.0}))
        else:
            place.mkdir()
    make(base, trainer=tk.SFT(max_steps=1)).run(tmp_path / "run", resume=resumed)


def test_what_a_killed_process_left_is_cleared_away(base, stopped):
    (stopped / "checkpoints" / ".step-000006.123").mkdir()
    (stopped / "checkpoints" / ".step-000006.123" / "state.pt").write_bytes(b"torn")
    (stopped / "adapter").mkdir()
    (stopped / "adapter" / "adapter_model.safetensors").write_bytes(b"torn")
    (stopped / "adapter" / "left.safetensors").write_bytes(b"torn")
    run = make(base).run(stopped, resume=True)
    assert not list((stopped / "checkpoints").glob(".*"))
    assert not (stopped / "adapter" / "left.safetensors").exists()
    assert tk.open_run(stopped).generate("repeat 3", max_new_tokens=4) == run.generate("repeat 3", max_new_tokens=4)


def test_states_of_other_shapes_are_refused_before_the_first_step(base, stopped):
    found = checkpoint.newest(stopped / "checkpoints")
    state = found.state
    moments = state["trainer"]["optimizer"]["state"][0]
    moments["exp_avg"] = moments["exp_avg"].T.contiguous()
    checkpoint.write(stopped / "checkpoints", 4, checkpoint.trained_parameters(_with(found, base)), state)
    with pytest.raises(tk.TrainingError, match="states in the checkpoint are not of parameter 0, of shape"):
        make(base).run(stopped, resume=True)


def _with(found, base):
    """The model that the checkpoint is of."""
    from transformers import AutoModelForCausalLM

    model = tk.LoRA(rank=2).attach(AutoModelForCausalLM.from_pretrained(base), tk.Context(model_id="x"))
    found.load_parameters(model)
    return model


def test_every_fact_is_compared():
    """A fact that is added must be compared, or named here as one that need not be."""
    assert {field.name for field in attrs.fields(resume.Facts)} == {"recipe", "environment", "data", "template", "base"}
