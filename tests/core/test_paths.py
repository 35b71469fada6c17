"""No name leads out of a run directory: what tunekit is given as a name never becomes a path, or is refused."""

import json
import os
import shutil

import attrs
import pytest

import tunekit as tk
from tunekit.core.model.base import Base
from tunekit.core.run import adapter_files, checkpoint
from tunekit.core.run import files as run
from tunekit.testing import tiny_model, tiny_tokenizer
from tunekit.testing.tiny import CHATML

NAMES = {
    "up": "../x",
    "absolute": "/tmp/tunekit-x",
    "up within": "a/../../b",
    "parent": "..",
    "device": "CON",
    "nul": "a\0b",
    "long": "x" * 300,
    "slash in unicode": "..\u2215x",
    "backslash": "..\\x",
}
"""What is tried as a name wherever one can be given."""
ROWS = [{"prompt": f"repeat {n}", "completion": f"{n} {n}"} for n in range(6)]

hostile = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


def make(model, adapter=None, **changes):
    parts = {"data": tk.InMemory(rows=ROWS), "validation": 0.25, "evaluators": (tk.Perplexity(),)}
    trainer = tk.SFT(max_steps=2, batch_size=2, save_every=1)
    return tk.Pipeline(model=str(model), adapter=adapter or tk.LoRA(rank=2), trainer=trainer, **{**parts, **changes})


def tree(place):
    return {path.relative_to(place).as_posix() for path in place.rglob("*")}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory three levels down, so that a way up would be seen from the top."""
    place = tmp_path / "a" / "b" / "c"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def stopped(tiny_directory, tmp_path):
    """A run that can be resumed, and a directory beside it that nobody may touch."""

    class Stop:
        @tk.hookimpl
        def tunekit_saved(self):
            raise KeyboardInterrupt

    pipeline = make(tiny_directory)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(tmp_path / "run", observers=[Stop()])
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "mine.txt").write_text("mine")
    return pipeline, tmp_path / "run", tmp_path / "outside"


@hostile
def test_the_name_of_a_component_is_no_path(tiny_directory, here, tmp_path, name):
    @attrs.frozen(kw_only=True)
    class Method(tk.LoRA):
        """LoRA by another name."""

    @attrs.frozen(kw_only=True)
    class Metric(tk.Perplexity):
        """Perplexity by another name."""

    Method.name = Metric.name = name
    made = make(tiny_directory, Method(rank=2), evaluators=(Metric(),)).run("run")
    made.export("merged")
    assert tree(tmp_path) - {f"a/b/c/{path}" for path in tree(here)} == {"a", "a/b", "a/b/c"}
    assert {path.split("/")[0] for path in tree(here)} == {"run", "merged"}
    assert {path.name for path in (made.directory / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tunekit.json",
    }
    assert not os.path.lexists(NAMES["absolute"])


@pytest.mark.parametrize(
    "adapter",
    [tk.LoRA(rank=2), tk.AdaLoRA(initial_rank=2, target_rank=2), tk.IA3(), tk.LoHa(rank=2), tk.LoKr(rank=2)],
    ids=lambda adapter: adapter.name,
)
def test_peft_is_given_no_name_to_make_a_path_of(adapter, tmp_path):
    context = tk.Context(model_id="tiny", total_steps=8)
    model = adapter.attach(tiny_model(), context)
    assert list(model.peft_config) == ["default"], "PEFT writes any other name into a directory of that name"
    adapter.save(model, tmp_path)
    assert tree(tmp_path) == {"adapter_config.json", "adapter_model.safetensors"}


@hostile
def test_a_model_is_a_directory_or_an_id_and_no_way_around(here, name):
    if name == "CON":
        Base(model=name).check()  # as a Hub id it goes nowhere in the file system
    else:
        with pytest.raises(tk.ConfigError, match=r"and a Hub id it cannot be|holds no config\.json|File name too long"):
            Base(model=name).check()
    with pytest.raises(tk.ConfigError, match="no embedded asset"):
        Base(model=f"tunekit:{name}").check()


@hostile
def test_a_recipe_names_components_not_files(tiny_directory, name):
    table = make(tiny_directory).to_dict()
    with pytest.raises((tk.UnknownComponent, tk.PluginError)):
        tk.Pipeline.from_dict({**table, "adapter": {"use": name}})


@hostile
def test_a_manifest_opens_no_file_but_those_beside_it(tiny_directory, tmp_path, name, monkeypatch):
    directory = make(tiny_directory).run(tmp_path / "run").directory
    opened = []
    true = adapter_files.sha256
    monkeypatch.setattr(adapter_files, "sha256", lambda path: opened.append(path) or true(path))
    path = directory / "adapter" / adapter_files.PROVENANCE
    stated = json.loads(path.read_text())
    stated.pop("sha256")
    stated["files"] = {name: "0" * 64, **stated["files"]}
    run.write_json(path, {**stated, "sha256": adapter_files._digest(stated)})
    with pytest.raises(tk.ConfigError, match="is missing"):
        adapter_files.check_files(path.parent)
    assert {found.parent for found in opened} <= {path.parent}

    (place,) = (directory / "checkpoints").glob("step-*")
    manifest = json.loads((place / checkpoint.MANIFEST).read_text())
    manifest["sha256"][name] = "0" * 64
    (place / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.setattr(checkpoint, "sha256", lambda path: opened.append(path) or true(path))
    assert checkpoint.is_whole(place)
    assert {found.parent for found in opened} <= {path.parent, place}


@pytest.mark.parametrize("name", [NAMES["up"], NAMES["absolute"], NAMES["up within"], NAMES["backslash"]])
def test_the_weights_of_a_base_are_in_its_directory(tmp_path, name):
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(tk.ConfigError, match="outside of its directory"):
        Base(model=str(tmp_path)).weight_files()


@pytest.mark.parametrize("name", ["adapter", "log.txt", "metrics.jsonl", "checkpoints"])
def test_a_link_out_of_a_run_directory_is_not_written_through(stopped, name):
    pipeline, directory, outside = stopped
    target = outside / name
    if (directory / name).is_dir():
        shutil.move(directory / name, target)
    elif (directory / name).exists():
        shutil.copy(directory / name, target)
        (directory / name).unlink()
    else:
        target.mkdir()
    (directory / name).symlink_to(target)
    before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    with pytest.raises(tk.ConfigError, match=rf"{name} is a link out of the run directory"):
        pipeline.run(directory, resume=True)
    assert before == {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}


def test_a_link_within_a_run_directory_is_no_matter(stopped):
    pipeline, directory, _ = stopped
    (directory / "newest").symlink_to("checkpoints")
    assert pipeline.run(directory, resume=True).metrics


@hostile
def test_a_template_that_is_called_like_a_path_is_not_written(tmp_path, name):
    place = tmp_path / "deep" / "base"
    tiny_model().save_pretrained(place)
    tiny_tokenizer(template=None).save_pretrained(place)
    path = place / "tokenizer_config.json"
    templates = [{"name": "default", "template": CHATML}, {"name": name, "template": "stolen"}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": templates}))
    make(place).run(tmp_path / "deep" / "run").export(tmp_path / "deep" / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"base", "run", "merged"}
    assert {path.name for path in (tmp_path / "deep" / "merged").rglob("*.jinja")} == {"chat_template.jinja"}
