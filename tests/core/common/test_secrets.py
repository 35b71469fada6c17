"""Secrets of the environment are in no file that a run writes, and in no recipe."""

import shutil

import pytest

import tunekit as tk
from tunekit.core.common import secrets

ROWS = [{"prompt": f"repeat {n}", "completion": f"{n} {n}"} for n in range(6)]
VARIABLES = {
    "HF_TOKEN": "hf_sentinelOfTheHub",
    "WANDB_API_KEY": "sentinel0123456789abcdef",
    "OPENAI_API_KEY": "sk-sentinel-openai",
    "AWS_SECRET_ACCESS_KEY": "sentinel/aws+secret=",
    "DATABASE_PASSWORD": "sentinel of a database",
    "my_secret": "sentinel-in-lower-case",
}


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)


def make(model, **changes):
    parts = {"data": tk.InMemory(rows=ROWS), "validation": 0.25, "adapter": tk.LoRA(rank=2)}
    trainer = tk.SFT(max_steps=2, batch_size=2, save_every=1)
    return tk.Pipeline(model=str(model), **{"trainer": trainer, **parts, **changes})


def leaks(place, *more):
    """Every file under a directory in whose bytes a secret stands."""
    wanted = [value.encode() for value in [*VARIABLES.values(), *more]]
    files = [path for path in place.rglob("*") if path.is_file()]
    assert files
    return {path.name for path in files if any(value in path.read_bytes() for value in wanted)}


# Of checkpoints that the Trainer makes of PEFT models: PEFT asks after the base by the name it is given.
@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.parametrize("save", [{}, {"report_to": "none", "save_strategy": "steps", "save_steps": 1}])
def test_no_file_of_a_run_or_an_export_holds_a_secret(tiny_directory, tmp_path, save):
    trainer = {"trainer": tk.Transformers(arguments={"max_steps": 2, **save})} if save else {}
    pipeline = make(tiny_directory, **trainer)
    pipeline.save(tmp_path / "recipe.toml")
    pipeline.run(tmp_path / "run").export(tmp_path / "merged")
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"recipe.toml", "environment.json", "log.txt", "result.json", "tunekit.json", "README.md"} <= names
    assert {"training_args.bin" if save else "state.pt"} <= names
    assert leaks(tmp_path) == set()


def test_the_text_of_an_exception_is_logged_without_its_secrets(tiny_directory, tmp_path):
    class Stop:
        @tk.hookimpl
        def tunekit_saved(self):
            said = " ".join(VARIABLES.values())
            raise KeyboardInterrupt(f"{said} https://me:a-password@host/x?token=a-parameter&page=2")

    with pytest.raises(KeyboardInterrupt):
        make(tiny_directory).run(tmp_path / "run", observers=[Stop()])
    assert leaks(tmp_path / "run", "a-password", "a-parameter") == set()
    line = (tmp_path / "run" / "log.txt").read_text().splitlines()[-1]
    assert line.endswith("stopped by KeyboardInterrupt: *** *** *** *** *** *** https://***@host/x?token=***&page=2")


def test_why_a_plugin_failed_is_recorded_without_its_secrets(tiny_directory, tmp_path, install, monkeypatch):
    from tunekit.core.registry import default_registry

    monkeypatch.setenv("LICENCE_KEY", "no licence found")  # what that plugin says
    install("fake-raises")
    default_registry.cache_clear()
    try:
        with pytest.warns(tk.PluginWarning):
            make(tiny_directory).run(tmp_path / "run")
    finally:
        default_registry.cache_clear()
    assert '"error": "RuntimeError: ***"' in (tmp_path / "run" / "environment.json").read_text()


URL = "https://me:a-password@host/data.jsonl"


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"data": tk.JsonLines(path=URL)}, "recipe.data.path"),
        ({"data": tk.JsonLines(path="https://host/data.jsonl?access_token=abcdefgh")}, "recipe.data.path"),
        ({"data": tk.InMemory(rows=[{"text": "the key is sk-sentinel-openai"}])}, "recipe.data.rows[0].text"),
        ({"trainer": tk.Transformers(arguments={"hub_token": "x"})}, "recipe.trainer.arguments.hub_token"),
        ({"template": "{{ messages }} sk-sentinel-openai"}, "recipe.template"),
        ({"revision": "hf_" + "a" * 34}, "recipe.revision"),
    ],
)
def test_a_recipe_with_a_secret_is_written_nowhere(tiny_directory, tmp_path, changes, where):
    pipeline = make(tiny_directory, **changes)
    for act in (
        pipeline.check,
        lambda: pipeline.run(tmp_path / "run"),
        lambda: pipeline.save(tmp_path / "recipe.toml"),
    ):
        with pytest.raises(tk.ConfigError, match="holds a secret") as caught:
            act()
        assert caught.value.where == where
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_path_is_a_url_with_a_password_is_refused(tiny_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_directory, tmp_path / "https:" / "me:a-password@host" / "model")  # it could even be there
    with pytest.raises(tk.ConfigError, match="holds a secret"):
        make("https://me:a-password@host/model").run("run")
    assert not (tmp_path / "run").exists()


def test_what_is_no_secret_is_left_alone(tiny_directory, tmp_path, monkeypatch):
    for name, value in {
        "HF_TOKEN": "short",
        "TOKENIZERS_PARALLELISM": "pipeline",
        "HF_TOKEN_PATH": "/home/me/a-token-file",
        "KEYBOARD_LAYOUT": "pipeline",
    }.items():
        monkeypatch.setenv(name, value)
    text = "pipeline short /home/me/a-token-file step 3 at 10:30@noon mail me@host ssh://git@host/x tokens=12"
    assert secrets.redacted(text) == text.replace("git@", "***@")
    rows = [{"prompt": "connect", "completion": "postgres://me:password@localhost/x?token=12", "api_key": "a column"}]
    make(tiny_directory, data=tk.InMemory(rows=rows, columns={"prompt": "prompt", "completion": "completion"})).check()


def test_a_longer_secret_is_taken_out_before_one_that_is_a_part_of_it(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "sentinel-one")
    monkeypatch.setenv("B_TOKEN", "sentinel-one-and-more")
    assert secrets.redacted("<sentinel-one-and-more> <sentinel-one>") == "<***> <***>"
