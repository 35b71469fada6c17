"""A run directory is taken once, and what is logged can be read while the run goes on."""

import json

import pytest

from tunekit import ConfigError, RunExists, TrainingError
from tunekit.core.registry import Registry
from tunekit.core.run import files
from tunekit.core.run.observers import Observers
from tunekit.core.run.resume import Facts, reopen
from tunekit.core.run.run_log import RunLog
from tunekit.testing import tiny_model

NOBODY = Registry(builtins={}, environment={"TUNEKIT_DISABLE_PLUGINS": "*"})


@pytest.fixture
def log(tmp_path):
    files.create(tmp_path / "run")
    return RunLog(directory=tmp_path / "run", observers=Observers(NOBODY))


FACTS = Facts(
    recipe={},
    environment={"components": {}, "packages": {}, "dtype": "float32", "device": "cpu", "python": "3"},
    data="rows",
    template="",
    base={"model": "m", "revision": None, "config": {}, "weights_sha256": "", "commit": None},
)


def started(log):
    """What a pipeline writes before the first step, as far as resuming looks at it."""
    FACTS.write(log.directory)
    FACTS.start(log.directory, {})


def test_each_log_call_is_one_line_that_can_be_read_at_once(log):
    log.log(1, {"loss": 2.5})
    log.log(2, {"loss": 1.5, "learning_rate": 1e-4})
    assert files.history(log.directory) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5, "learning_rate": 1e-4}]
    assert len((log.directory / files.METRICS).read_text().splitlines()) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_not_finite_is_refused_and_not_written(log, value):
    with pytest.raises(TrainingError, match=r"step 3: loss is (nan|inf)"):
        log.log(3, {"loss": value})
    assert files.history(log.directory) == []


def test_what_was_logged_after_a_checkpoint_is_forgotten_a_torn_last_line_included(log):
    for step in (1, 2, 3):
        log.log(step, {"loss": 1.0})
    with (log.directory / files.METRICS).open("a") as file:
        file.write('{"step": 4, "lo')
    log.save(2, tiny_model(), {})
    started(log)
    reopen(log.directory, FACTS, 9, force=False)
    assert [line["step"] for line in files.history(log.directory)] == [1, 2]


def test_a_save_holds_all_states_and_deletes_the_old(log):
    log.method_state = lambda: {"ranks": [4, 2]}
    for step in (1, 2, 3):
        log.save(step, tiny_model(), {"rate": 0.1}, keep=2)
    names = sorted(path.name for path in (log.directory / files.CHECKPOINTS).iterdir())
    assert names == ["step-000002", "step-000003"]
    started(log)
    found = reopen(log.directory, FACTS, 9, force=False).checkpoint
    assert (found.step, found.state["trainer"], found.state["method"]) == (3, {"rate": 0.1}, {"ranks": [4, 2]})
    assert set(found.state["random"]) == {"python", "numpy", "torch", "cuda"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({files.RECIPE: "", files.RESULT: "{}"}, "holds a finished run; read it with tunekit.open_run"),
        ({files.RECIPE: "", "checkpoints/step-000001/x": ""}, "holds an unfinished run; go on with run.*resume=True"),
        ({files.RECIPE: ""}, "stopped before its first checkpoint; begin it again with run.*resume=True"),
        ({"thesis.tex": ""}, "is not empty; choose another directory"),
    ],
)
def test_a_taken_directory_says_how_to_go_on(tmp_path, content, says):
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(RunExists, match=says):
        files.create(tmp_path)


def test_a_directory_that_cannot_be_made_is_an_error_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunExists, match="file is a file"):
        files.create(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"cannot make the run directory .*file/run"):
        files.create(tmp_path / "file" / "run")


def test_a_result_that_cannot_be_read_names_its_file(tmp_path):
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*result\.json"):
        files.read_json(tmp_path / "result.json")
    files.write_json(tmp_path / "result.json", {"a": 1})
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": 1}
