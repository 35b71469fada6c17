"""Trackers are told of a run: what they then hold is read back by their own libraries."""

import csv
import json
import sqlite3

import pytest

import tunekit as tk
from tunekit.core.registry import Registry
from tunekit.core.run.observers import Observers
from tunekit.core.run.run_log import RunLog

NOBODY = Registry(builtins={}, environment={"TUNEKIT_DISABLE_PLUGINS": "*"})
LOGGED = [
    (1, {"loss": 2.0, "tokens": 12}),
    (2, {"loss": 1.5, "tokens": 9}),
    (2, {"validation/perplexity": 7.25}),
    (3, {"loss": 1.25, "tokens": 11}),
]
EXPECTED = {
    "loss": [(1, 2.0), (2, 1.5), (3, 1.25)],
    "tokens": [(1, 12), (2, 9), (3, 11)],
    "validation/perplexity": [(2, 7.25)],
}
OUTCOME = {"base/perplexity": 9.0, "tuned/perplexity": 4.5}


class Resumed:
    """As much of a checkpoint as observers look at."""

    step = 2


def show(directory, *observers, logged=LOGGED, resumed=None, error=None):
    """Tell the observers of a run, as the pipeline would."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": "q" * 400, "completion": "a"}] * 40
    pipeline = tk.Pipeline(model=tk.TINY, data=tk.InMemory(rows=rows), trainer=tk.SFT(learning_rate=0.5))
    pipeline.save(directory / "recipe.toml")
    run = RunLog(directory=directory, observers=Observers(NOBODY, observers), resumed=resumed)
    run.begin(3, [])
    for step, metrics in logged:
        run.log(step, metrics)
    if error is None:
        result = {"metrics": {"perplexity": 4.5}, "base_metrics": {"perplexity": 9.0}}
        (directory / "result.json").write_text(json.dumps(result), encoding="utf-8")
    run.end(error)


@pytest.mark.parametrize("error", [None, ValueError("disk is full")])
def test_a_csv_has_a_row_a_step_whether_or_not_the_run_failed(tmp_path, error):
    show(tmp_path / "run", tk.Csv(), error=error)
    with (tmp_path / "run/metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "loss", "tokens", "validation/perplexity"]
    found = {name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in EXPECTED}
    assert found == EXPECTED
    assert [row["step"] for row in rows] == ["1", "2", "3"]


def test_a_csv_of_a_run_that_logged_nothing_has_a_header(tmp_path):
    show(tmp_path / "run", tk.Csv(), logged=[])
    assert (tmp_path / "run/metrics.csv").read_text(encoding="utf-8") == "step\n"


def read_events(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory / "tensorboard"))
    found.Reload()
    scalars = {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}
    (text,) = found.Tensors("recipe/text_summary")[:1]
    return scalars, text.tensor_proto.string_val[0].decode()


def test_tensorboard_reads_every_metric_at_its_step_and_the_recipe(tmp_path):
    pytest.importorskip("tensorboard", reason='pip install "tunekit-sdk[tensorboard]"')
    show(tmp_path / "run", tk.TensorBoard())
    scalars, text = read_events(tmp_path / "run")
    assert scalars == {**EXPECTED, "base/perplexity": [(0, 9.0)], "tuned/perplexity": [(3, 4.5)]}
    assert "    trainer.learning_rate = 0.5" in text.splitlines()


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path):
    pytest.importorskip("tensorboard", reason='pip install "tunekit-sdk[tensorboard]"')
    show(tmp_path / "run", tk.TensorBoard(), logged=[*LOGGED[:3], (3, {"loss": 99.0})], error=KeyboardInterrupt())
    show(tmp_path / "run", tk.TensorBoard(), logged=LOGGED[3:], resumed=Resumed())
    scalars, _ = read_events(tmp_path / "run")
    assert scalars["loss"] == EXPECTED["loss"]


def test_one_tensorboard_follows_several_runs(tmp_path):
    pytest.importorskip("tensorboard", reason='pip install "tunekit-sdk[tensorboard]"')
    observer = tk.TensorBoard()
    for name in ("a", "b"):
        show(tmp_path / name, observer)
        assert read_events(tmp_path / name)[0]["loss"] == EXPECTED["loss"]


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A local MLflow store of files: quick; that of SQLite takes seconds to make."""
    pytest.importorskip("mlflow", reason='pip install "tunekit-sdk[mlflow]"')
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "mlruns").as_uri()


def read_mlflow(store, experiment):
    from mlflow import MlflowClient

    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    history = {
        name: sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name))
        for name in run.data.metrics
    }
    return run, history


def test_mlflow_reads_metrics_parameters_and_how_it_ended(tmp_path, store):
    show(tmp_path / "runs/first", tk.Mlflow(experiment="mine", tracking_uri=store))
    run, history = read_mlflow(store, "mine")
    assert {name: history[name] for name in EXPECTED} == EXPECTED
    assert {name: run.data.metrics[name] for name in OUTCOME} == OUTCOME
    assert run.data.params["trainer.learning_rate"] == "0.5"
    assert (run.info.run_name, run.info.status) == ("runs/first", "FINISHED")


def test_mlflow_has_a_resumed_run_as_one_and_sees_a_failure(tmp_path, store):
    observer = tk.Mlflow(tracking_uri=store)
    show(tmp_path / "run", observer, logged=LOGGED[:3], error=ValueError())
    assert read_mlflow(store, "tunekit")[0].info.status == "FAILED"
    show(tmp_path / "run", observer, logged=LOGGED[3:], resumed=Resumed())
    run, history = read_mlflow(store, "tunekit")
    assert history["loss"] == EXPECTED["loss"]
    assert run.info.status == "FINISHED"


@pytest.mark.filterwarnings("ignore")
def test_wandb_has_an_offline_run_in_the_run_directory(tmp_path):
    pytest.importorskip("wandb", reason='pip install "tunekit-sdk[wandb]"')
    observer, logged = tk.Wandb(mode="offline"), {}

    class Looks:
        @tk.hookimpl
        def tunekit_run_finished(self):
            logged.update(dict(observer._run.summary))

    # The file it writes is in a format of wandb's own, which nothing public reads: what wandb says of the run must do.
    show(tmp_path / "run", Looks(), observer)
    # A step is in the summary when the next one is logged, the last one when the run ends.
    assert {name: logged[name] for name in EXPECTED} == {name: dict(values)[2] for name, values in EXPECTED.items()}
    assert logged["_step"] == 2
    assert observer._run.config["trainer.learning_rate"] == 0.5
    assert observer._run.id == (tmp_path / "run/wandb.id").read_text(encoding="utf-8")
    assert len(list((tmp_path / "run/wandb").glob(f"offline-run-*/run-{observer._run.id}.wandb"))) == 1


@pytest.mark.filterwarnings("ignore")
def test_trackio_keeps_a_local_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason='pip install "tunekit-sdk[trackio]"')
    show(tmp_path / "run", tk.Trackio())
    with sqlite3.connect(tmp_path / "trackio/tunekit.db") as database:
        lines = [(step, json.loads(text)) for step, text in database.execute("SELECT step, metrics FROM metrics")]
    found = {name: sorted((step, line[name]) for step, line in lines if name in line) for name in EXPECTED}
    assert found == EXPECTED
    assert any(line.items() >= OUTCOME.items() for _, line in lines)


@pytest.mark.parametrize("name", ["TensorBoard", "Mlflow", "Wandb", "Trackio"])
def test_a_tracker_that_is_not_installed_is_refused_before_the_run_it_was_to_follow(monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(tk.ConfigError, match=f"{name} needs {name.lower()}: pip install {name.lower()}"):
        getattr(tk, name)()
