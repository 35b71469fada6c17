"""A disk that is full, read-only or gone stops a run with the path in the error, and the last checkpoint stays whole."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

import tunekit as tk
from tunekit.core.run import checkpoint, files

resource = pytest.importorskip("resource", reason="Windows has no limits on the size of files")

ROWS = [{"prompt": f"repeat {n}", "completion": f"{n} {n}"} for n in range(12)]
ADAPTER = "adapter/adapter_model.safetensors"
NOBODY = 65534


def make(model):
    trainer = tk.SFT(max_steps=6, batch_size=3, learning_rate=0.01, save_every=2)
    return tk.Pipeline(
        model=str(model), data=tk.InMemory(rows=ROWS), adapter=tk.LoRA(rank=2, dropout=0.1), trainer=trainer
    )


@contextmanager
def files_of_at_most(size):
    """Within it, no file can be made longer: as on a full disk, a write is cut short and then fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class At:
    """Does something when the checkpoint of a step is saved."""

    def __init__(self, step, does):
        self.step, self.does = step, does

    @tk.hookimpl
    def tunekit_saved(self, step, directory):
        if step == self.step:
            self.does(directory)


@pytest.fixture(scope="module")
def whole(tiny_directory, tmp_path_factory):
    return make(tiny_directory).run(tmp_path_factory.mktemp("whole") / "run")


def is_the_same_run(pipeline, directory, whole):
    resumed = pipeline.run(directory, resume=True)
    assert resumed.history == whole.history
    assert (resumed.directory / ADAPTER).read_bytes() == (whole.directory / ADAPTER).read_bytes()


@pytest.mark.parametrize("full_at", [checkpoint.PARAMETERS, checkpoint.STATE, "metrics"])
def test_a_full_disk_stops_the_run_at_the_file_and_the_run_goes_on_when_there_is_room(
    tiny_directory, tmp_path, whole, full_at
):
    directory = tmp_path / "run"
    place = next((whole.directory / "checkpoints").iterdir())
    sizes = [(place / name).stat().st_size for name in (checkpoint.PARAMETERS, checkpoint.STATE)]
    assert 3000 < sizes[0] < sizes[1]
    limit = {checkpoint.PARAMETERS: 3000, checkpoint.STATE: sum(sizes) // 2, "metrics": 60}[full_at]
    says = r"metrics\.jsonl|log\.txt" if full_at == "metrics" else "checkpoints/step-000004"
    limited = files_of_at_most(limit)
    try:
        with pytest.raises(tk.TrainingError, match=rf"cannot write {directory}/({says}).*File too large.*resume=True"):
            make(tiny_directory).run(directory, observers=[At(2, lambda saved: limited.__enter__())])
    finally:
        limited.__exit__(None, None, None)
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["step-000002"], "and nothing half-written"
    assert checkpoint.is_whole(directory / "checkpoints" / "step-000002")
    is_the_same_run(make(tiny_directory), directory, whole)


def test_a_disk_that_is_full_when_the_adapter_is_written_leaves_a_run_to_be_resumed(tiny_directory, tmp_path, whole):
    limited = files_of_at_most(3000)
    try:
        with pytest.raises(tk.TrainingError, match=rf"cannot write {tmp_path}/run/adapter: .*File too large"):
            make(tiny_directory).run(tmp_path / "run", observers=[At(4, lambda saved: limited.__enter__())])
    finally:
        limited.__exit__(None, None, None)
    is_the_same_run(make(tiny_directory), tmp_path / "run", whole)


def test_a_directory_that_vanishes_is_named_and_not_made_again(tiny_directory, tmp_path):
    with pytest.raises(tk.TrainingError, match=rf"cannot write {tmp_path}/run/.*No such file or directory"):
        make(tiny_directory).run(tmp_path / "run", observers=[At(2, lambda saved: shutil.rmtree(tmp_path / "run"))])
    assert not (tmp_path / "run").exists()


@pytest.fixture
def ours(tiny_directory, monkeypatch):
    """A directory with a copy of the model in it, and a user who cannot write where he may not: root always can."""
    place = Path(tempfile.mkdtemp())
    shutil.copytree(tiny_directory, place / "model")
    (place / "cache").mkdir()
    monkeypatch.setenv("TUNEKIT_CACHE", str(place / "cache"))
    make(place / "model").plan()  # starts the process that renders templates, for which he may lack the right
    if os.geteuid() == 0:
        for path in [place, *place.rglob("*")]:
            os.chown(path, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield place
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        for path in [place, *place.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(place)


def test_a_directory_that_becomes_read_only_is_named_and_the_run_goes_on_when_it_is_not(ours):
    whole = make(ours / "model").run(ours / "whole")
    with pytest.raises(tk.TrainingError, match=rf"cannot write {ours}/run/checkpoints/step-000004: Permission denied"):
        make(ours / "model").run(ours / "run", observers=[At(2, lambda saved: saved.parent.chmod(0o555))])
    (ours / "run" / "checkpoints").chmod(0o755)
    is_the_same_run(make(ours / "model"), ours / "run", whole)


def test_a_read_only_place_is_an_error_before_training(ours, monkeypatch):
    monkeypatch.setattr("tunekit.core.model.base.Base.load", lambda *_, **__: pytest.fail("weights were loaded"))
    (ours / "here").mkdir()
    (ours / "here").chmod(0o555)
    with pytest.raises(tk.ConfigError, match=rf"cannot make the run directory {ours}/here/run: Permission denied"):
        make(ours / "model").run(ours / "here" / "run")
    with pytest.raises(tk.ConfigError, match=rf"cannot make the run directory {ours}/here: Permission denied"):
        make(ours / "model").run(ours / "here")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    files.write_json(tmp_path / "start.json", {"a": 1})
    with files_of_at_most(10), pytest.raises(OSError, match="File too large"):
        files.write_json(tmp_path / "start.json", {"a": "b" * 99})
    assert files.read_json(tmp_path / "start.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["start.json"]
