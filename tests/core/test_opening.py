"""A file cannot allow code to run: who reads it does."""

import json
import sys

import pytest

import tunekit as tk
from tunekit.core.registry import default_registry

ROWS = [{"prompt": f"repeat {n}", "completion": f"{n} {n}"} for n in range(6)]


@pytest.fixture
def pipeline(tiny_directory):
    trainer = tk.SFT(max_steps=1, batch_size=2)
    parts = {"adapter": tk.LoRA(rank=2), "trainer": trainer, "validation": 0}
    return tk.Pipeline(model=str(tiny_directory), data=tk.InMemory(rows=ROWS), trust_remote_code=True, **parts)


def test_a_recipe_that_lets_code_run_is_refused_unless_its_reader_says_so(pipeline, tmp_path):
    path = tmp_path / "recipe.toml"
    pipeline.save(path)
    with pytest.raises(tk.ConfigError, match=r"trust_remote_code=True to the call that reads this file") as caught:
        tk.load(path)
    assert caught.value.where == f"{path}: recipe.trust_remote_code"
    assert tk.load(path, trust_remote_code=True) == pipeline


def test_a_run_that_let_code_run_is_opened_by_whoever_says_so_and_resumed_by_its_pipeline(pipeline, tmp_path):
    pipeline.run(tmp_path / "run")
    with pytest.raises(tk.ConfigError, match=r"recipe\.trust_remote_code"):
        tk.open_run(tmp_path / "run")
    assert tk.open_run(tmp_path / "run", trust_remote_code=True).generate("repeat 1", max_new_tokens=1) is not None


def test_who_reads_a_recipe_does_not_change_it(pipeline, tmp_path):
    changed = tk.Pipeline.from_dict({**pipeline.to_dict(), "trust_remote_code": False})
    changed.save(tmp_path / "recipe.toml")
    assert tk.load(tmp_path / "recipe.toml", trust_remote_code=True) == changed == tk.load(tmp_path / "recipe.toml")


# Plugins that are gone -------------------------------------------------------------------------------------------------

PLUGIN = """
import attrs, tunekit as tk

@attrs.frozen(kw_only=True)
class Gone(tk.{base}):
    name = "gone"
    {body}

@tk.hookimpl
def tunekit_components():
    return [Gone]
"""
EVALUATOR = 'better = {"gone": "max"}\n    def evaluate(self, *parts):\n        return {"gone": 1.0}'
SOURCE = f"def load(self, split):\n        return [tk.to_example(row, 'prompt-completion') for row in {ROWS!r}]"


@pytest.fixture
def gone(tmp_path, monkeypatch):
    """Makes a run with a component of a plugin that is not there afterwards: `gone("Evaluator", "body", **recipe)`."""
    site = tmp_path / "site"
    metadata = site / "gone_plugin-2.5.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: gone-plugin\nVersion: 2.5\n")
    (metadata / "entry_points.txt").write_text("[tunekit]\ngone = fake_gone\n")

    def made(base, body, **fields):
        (site / "fake_gone.py").write_text(PLUGIN.format(base=base, body=body))
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(site))
            patch.delitem(sys.modules, "fake_gone", raising=False)
            default_registry.cache_clear()
            tk.Pipeline.from_dict(fields).run(tmp_path / "run")
        sys.modules.pop("fake_gone", None)
        default_registry.cache_clear()
        return tmp_path / "run"

    yield made
    sys.modules.pop("fake_gone", None)
    default_registry.cache_clear()


def table(model, tmp_path, **changes):
    """A recipe that names components by their names alone."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    parts = {"data": {"use": "json-lines", "path": str(rows)}, "validation": 0.4, "evaluators": []}
    trainer = {"use": "sft", "max_steps": 1, "batch_size": 2}
    return {"model": str(model), "adapter": {"use": "lora", "rank": 2}, "trainer": trainer, **parts, **changes}


@pytest.mark.parametrize(
    ("base", "body", "changes"),
    [
        ("Evaluator", EVALUATOR, {"evaluators": [{"use": "gone"}]}),
        ("DataSource", SOURCE, {"data": {"use": "gone"}}),
        ("DataSource", SOURCE, {"validation": {"use": "gone-plugin/gone"}}),
    ],
    ids=["evaluator", "data", "validation"],
)
def test_a_run_is_asked_and_exported_without_the_plugins_that_only_measure_and_read(
    gone, tiny_directory, tmp_path, base, body, changes
):
    directory = gone(base, body, **table(tiny_directory, tmp_path, **changes))
    run = tk.open_run(directory)
    assert run.generate("repeat 1", max_new_tokens=2) is not None
    assert (run.export(tmp_path / "exported") / "model.safetensors").is_file()
    with pytest.raises(tk.UnknownComponent) as caught:
        tk.load(directory / "recipe.toml")
    assert "The run was made with gone-plugin 2.5: pip install gone-plugin==2.5" in str(caught.value)


def test_a_run_whose_method_is_gone_says_which_distribution_and_version_brings_it_back(gone, tiny_directory, tmp_path):
    directory = gone("LoRA", "pass", **table(tiny_directory, tmp_path, adapter={"use": "gone", "rank": 2}))
    with pytest.raises(tk.UnknownComponent) as caught:
        tk.open_run(directory)
    assert str(caught.value).startswith(f"{directory / 'recipe.toml'}: recipe.adapter.use: no adapter is named 'gone'")
    assert str(caught.value).endswith("The run was made with gone-plugin 2.5: pip install gone-plugin==2.5")
    known = directory / "environment.json"
    known.write_text(
        known.read_text().replace('"adapter/gone": "gone-plugin 2.5"', '"adapter/gone": "local my_script"')
    )
    with pytest.raises(tk.UnknownComponent, match="was made with a class of the module 'my_script': import it first"):
        tk.open_run(directory)
    known.unlink()
    with pytest.raises(tk.UnknownComponent, match="no adapter is named 'gone'"):
        tk.open_run(directory)
