"""A run goes on wherever it is resumed: with what it has chosen itself, and with the same base and rows at other places.

Another machine is another choice of the dtype, another device, another path.
"""

import json
import shutil

import attrs
import pytest
import torch

import tunekit as tk
from tunekit.core.model import devices, fingerprint, precision
from tunekit.core.model.products import Speeds
from tunekit.core.run import files
from tunekit.testing import tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"repeat {n}", "completion": f"{n} {n}"} for n in range(9)]
SPEEDS = {"float32": Speeds(float32=300, bfloat16=60), "bfloat16": Speeds(float32=300, bfloat16=900)}
ADAPTER = "adapter/adapter_model.safetensors"


def make(model, data=None, **changes):
    parts = {
        "data": data or tk.InMemory(rows=ROWS),
        "validation": 0.2,
        "adapter": tk.LoRA(rank=2),
        "trainer": tk.SFT(max_steps=4, batch_size=3, learning_rate=0.01, save_every=2),
    }
    return tk.Pipeline(model=str(model), **{**parts, **changes})


class Stops:
    @tk.hookimpl
    def tunekit_saved(self):
        raise KeyboardInterrupt


def stopped(pipeline, directory):
    """Begin a run, and stop it at its first checkpoint."""
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(directory, observers=[Stops()])
    return directory


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine one that multiplies quickest in a dtype: `machine("bfloat16")`."""
    monkeypatch.delenv("TUNEKIT_CPU_DTYPE")
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(precision, "shapes_of", lambda model: ((1024, 1024),))

    def becomes(quickest):
        monkeypatch.setattr(precision, "measured", lambda shapes: SPEEDS[quickest])

    return becomes


@pytest.fixture
def base(tmp_path):
    """A model directory of our own."""
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# What it has chosen itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("there", "here"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_run_goes_on_in_the_dtype_that_was_chosen_where_it_began(there, here, machine, tiny_directory, tmp_path):
    machine(there)
    whole = make(tiny_directory).run(tmp_path / "whole")
    directory = stopped(make(tiny_directory), tmp_path / "run")
    machine(here)
    run = make(tiny_directory).run(directory, resume=True)
    assert files.read_json(directory / files.ENVIRONMENT)["dtype"] == there
    assert (directory / ADAPTER).read_bytes() == (whole.directory / ADAPTER).read_bytes()
    assert (run.history, run.metrics) == (whole.history, whole.metrics)
    assert run.result["resumes"] == [{"step": 2, "changed": [], "libraries": [], "moved": []}]
    opened = tk.open_run(directory)
    assert opened._model(tuned=True).model.get_base_model().dtype == getattr(torch, there)
    report = json.loads((opened.export(tmp_path / "merged") / "export.json").read_text())
    assert report["dtype"] == there


def test_the_environment_does_not_change_a_choice_that_was_made(tiny_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEKIT_CPU_DTYPE", "bfloat16")
    directory = stopped(make(tiny_directory), tmp_path / "run")
    monkeypatch.setenv("TUNEKIT_CPU_DTYPE", "float32")
    run = make(tiny_directory).run(directory, resume=True)
    assert run._model(tuned=True).model.get_base_model().dtype == torch.bfloat16


def test_a_dtype_that_is_asked_for_is_compared_with_what_was_chosen(machine, tiny_directory, tmp_path):
    machine("bfloat16")
    directory = stopped(make(tiny_directory), tmp_path / "run")
    with pytest.raises(tk.ConfigError, match="\n  dtype: 'bfloat16' -> 'float32'"):
        make(tiny_directory, dtype="float32").run(directory, resume=True)
    make(tiny_directory, dtype="bfloat16").run(directory, resume=True)


def test_a_run_that_was_asked_for_a_dtype_goes_on_with_it_where_nothing_is_asked(machine, tiny_directory, tmp_path):
    machine("float32")
    directory = stopped(make(tiny_directory, dtype="bfloat16"), tmp_path / "run")
    make(tiny_directory).run(directory, resume=True)
    assert files.read_json(directory / files.ENVIRONMENT)["dtype"] == "bfloat16"


def test_a_run_that_begins_again_has_its_dtype_too(machine, tiny_directory, tmp_path):
    machine("bfloat16")
    directory = stopped(make(tiny_directory), tmp_path / "run")
    shutil.rmtree(directory / files.CHECKPOINTS)
    machine("float32")
    make(tiny_directory).run(directory, resume=True)
    assert files.read_json(directory / files.ENVIRONMENT)["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("asked", "before", "there", "taken"),
    [
        (None, None, True, "cuda"),
        (None, None, False, "cpu"),
        (None, "cpu", True, "cpu"),
        (None, "cuda:3", True, "cuda"),
        (None, "cuda", False, "cpu"),
        ("cuda:1", "cpu", True, "cuda:1"),
        ("cpu", "cuda", True, "cpu"),
    ],
)
def test_the_device_is_the_one_asked_for_else_that_of_the_run_if_it_is_here(asked, before, there, taken, monkeypatch):
    monkeypatch.delenv(devices.VARIABLE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert devices.choose(asked, before) == taken


def test_a_device_that_is_asked_for_and_not_here_is_an_error_but_for_looking_at_a_finished_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(tk.ConfigError, match="'cuda:1' was asked for, but torch sees no CUDA device"):
        devices.choose("cuda:1", "cuda:1")
    assert (devices.here("cuda:1"), devices.here("cpu"), devices.here(None)) == ("cpu", "cpu", "cpu")


def test_a_run_begun_on_a_device_that_is_not_here_goes_on_with_what_is_and_says_so(
    tiny_directory, tmp_path, monkeypatch
):
    directory = stopped(make(tiny_directory), tmp_path / "run")
    environment = files.read_json(directory / files.ENVIRONMENT)
    files.write_json(directory / files.ENVIRONMENT, {**environment, "device": "cuda"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = make(tiny_directory, device="cpu").run(directory, resume=True)
    assert run.result["resumes"][0] == {
        "step": 2,
        "changed": [],
        "libraries": ["device: 'cuda' -> 'cpu'"],
        "moved": [],
    }
    assert " device: 'cuda' -> 'cpu'\n" in (directory / "log.txt").read_text()


def test_a_finished_run_that_was_asked_to_be_on_a_gpu_answers_on_the_cpu(tiny_directory, tmp_path, monkeypatch):
    run = make(tiny_directory, device="cpu").run(tmp_path / "run")
    recipe = tmp_path / "run" / files.RECIPE
    recipe.write_text(recipe.read_text().replace('device = "cpu"', 'device = "cuda"'))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tk.open_run(tmp_path / "run").generate("repeat 3") == run.generate("repeat 3")


def test_other_threads_are_noted(tiny_directory, tmp_path):
    directory = stopped(make(tiny_directory), tmp_path / "run")
    environment = files.read_json(directory / files.ENVIRONMENT)
    assert environment["threads"] == torch.get_num_threads()
    files.write_json(directory / files.ENVIRONMENT, {**environment, "threads": 64})
    run = make(tiny_directory).run(directory, resume=True)
    assert run.result["resumes"][0]["libraries"] == [f"threads: 64 -> {torch.get_num_threads()}"]


# The same at another place -------------------------------------------------------------------------------------------


def test_a_base_at_another_path_is_the_same_base_and_the_run_knows_where_it_is(base, tmp_path):
    whole = make(base).run(tmp_path / "whole")
    directory = stopped(make(base), tmp_path / "run")
    elsewhere = shutil.move(base, tmp_path / "elsewhere")
    run = make(elsewhere).run(directory, resume=True)
    line = f"the same by its hash: recipe.model: {str(base)!r} -> {str(elsewhere)!r}"
    assert run.result["resumes"] == [{"step": 2, "changed": [], "libraries": [], "moved": [line]}]
    assert line in (directory / "log.txt").read_text()
    assert (directory / ADAPTER).read_bytes() == (whole.directory / ADAPTER).read_bytes()
    opened = tk.open_run(directory)
    assert tk.load(directory / files.RECIPE) == make(elsewhere)
    assert opened.generate("repeat 3", max_new_tokens=4) == run.generate("repeat 3", max_new_tokens=4)


def test_another_base_at_another_path_is_refused_and_both_are_named(base, tmp_path):
    directory = stopped(make(base), tmp_path / "run")
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(tk.ConfigError) as caught:
        make(tmp_path / "other").run(directory, resume=True)
    said = str(caught.value)
    assert f"recipe.model: {str(base)!r} -> {str(tmp_path / 'other')!r}" in said
    assert "is of another base than 'other': the configuration is the same, the weights are not" in said


def rows_in(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_at_another_path_are_the_same_rows_and_others_are_not(tiny_directory, tmp_path):
    here, there = rows_in(tmp_path / "rows.jsonl"), rows_in(tmp_path / "copy.jsonl")
    other = rows_in(tmp_path / "other.jsonl", ROWS[1:])
    directory = stopped(make(tiny_directory, tk.JsonLines(path=str(here))), tmp_path / "run")
    with pytest.raises(tk.ConfigError, match=r"(?s)recipe\.data\.path: '\S+rows.jsonl' -> .*fingerprint of the rows"):
        make(tiny_directory, tk.JsonLines(path=str(other))).run(directory, resume=True)
    here.unlink()
    run = make(tiny_directory, tk.JsonLines(path=str(there))).run(directory, resume=True)
    assert run.result["resumes"][0]["moved"] == [
        f"the same by its hash: recipe.data.path: {str(here)!r} -> {str(there)!r}"
    ]
    assert tk.load(directory / files.RECIPE).data.path == str(there)


def test_the_same_rows_from_another_source_are_the_same_rows(tiny_directory, tmp_path):
    directory = stopped(make(tiny_directory), tmp_path / "run")
    path = rows_in(tmp_path / "rows.jsonl")
    run = make(tiny_directory, tk.JsonLines(path=str(path))).run(directory, resume=True)
    assert run.result["resumes"][0]["changed"] == []


def test_a_comparison_is_added_to_with_the_base_at_another_path(base, tmp_path):
    trainer = tk.SFT(max_steps=1, batch_size=3)
    tk.compare(make(base, trainer=trainer), adapters=[tk.LoRA(rank=2)], directory=tmp_path / "compared")
    elsewhere = shutil.move(base, tmp_path / "elsewhere")
    both = [tk.LoRA(rank=2), tk.IA3()]
    found = tk.compare(make(elsewhere, trainer=trainer), adapters=both, directory=tmp_path / "compared")
    assert len(found.arms) == 2
    longer = make(elsewhere, trainer=attrs.evolve(trainer, warmup=0.5))
    with pytest.raises(tk.ConfigError, match=r"changed: recipe\.trainer\.warmup: 0\.03 -> 0\.5\. Delete it"):
        tk.compare(longer, adapters=both, directory=tmp_path / "compared")


KNOWN = {"model": "org/name", "revision": "v1", "commit": "abc", "weights_sha256": "12", "config": {"a": 1}}


@pytest.mark.parametrize(
    ("now", "says"),
    [
        ({"model": "copy", "revision": None, "commit": None}, ""),
        ({"revision": "v2"}, ""),
        ({"config": {"a": 1, "new": 2}}, ""),
        ({"config": {"a": 2}}, "a is 2, not 1"),
        ({"weights_sha256": "34"}, r"the weights are not \(commit abc, here abc\)"),
        ({"weights_sha256": "34", "revision": "v2"}, "another revision of its base: 'v2' here, 'v1' there"),
        ({"weights_sha256": None}, "the weights are not"),
    ],
)
def test_a_base_is_known_by_its_configuration_and_weights_and_not_by_its_name_or_revision(now, says):
    other = {**KNOWN, **now}
    assert fingerprint.is_same(KNOWN, other) is (not says)
    if not says:
        fingerprint.check_same(KNOWN, other, "here")
        return
    with pytest.raises(tk.ConfigError, match=says):
        fingerprint.check_same(KNOWN, other, "here")


def test_without_a_hash_of_the_weights_the_revision_must_be_the_same():
    unknown = {**KNOWN, "weights_sha256": None}
    assert not fingerprint.is_same(unknown, unknown)
    fingerprint.check_same(unknown, {**unknown, "model": "copy"}, "here")
    with pytest.raises(tk.ConfigError, match="another revision of its base: 'main' here, 'v1' there"):
        fingerprint.check_same(unknown, {**unknown, "revision": None}, "here")


def test_of_every_field_that_may_be_left_open_it_is_known_what_a_resume_does():
    """The table is in docs/reliability.md: a field that is new has to have its line there."""
    kept_by_the_run = {"dtype", "device"}
    kept_by_checkpoints = {"micro_batch_size", "gradient_checkpointing", "keep_dequantized", "compile"}
    settled_by_what_is_compared = {"template", "learning_rate", "max_length", "save_every", "quantizer", "revision"}
    off = {"max_steps", "packing", "memory", "save_minutes", "keep_best", "evaluate_every", "patience", "stop_beyond"}
    parts = (tk.Pipeline(model=tk.TINY, data=tk.InMemory(rows=ROWS)), tk.SFT(compile="auto"))
    left_open = {
        field.name
        for part in parts
        for field in attrs.fields(type(part))
        if getattr(part, field.name) in (None, "auto")
    }
    assert left_open == kept_by_the_run | kept_by_checkpoints | settled_by_what_is_compared | off
