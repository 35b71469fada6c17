"""Runs on a local Ray are the runs that they would be here; one whose worker is killed ends as if it had not been."""

import importlib.util
import os
import secrets
import signal
import sys
import threading
import time
from pathlib import Path

import attrs
import pytest
from safetensors.torch import load_file

import tunekit as tk
from tunekit.core.remote import ray as remote
from tunekit.core.remote.gang import Lost
from tunekit.core.remote.job import Job
from tunekit.core.remote.worker import Whereabouts, variables
from tunekit.core.run import checkpoint, files, lock

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason='ray is not installed (pip install "tunekit-sdk[ray]")')

ROWS = [{"prompt": f"repeat {n}", "completion": "ab " * (1 + n * n)} for n in range(9)]
"""Of very different lengths; four a step, so that the last step of an epoch leaves a worker without rows."""
TRAINER = tk.SFT(epochs=2, batch_size=4, learning_rate=0.01, max_grad_norm=0.5, save_every=2)


@attrs.frozen(kw_only=True)
class Mortal(tk.LoRA):
    """LoRA, whose second process is killed once: in the step after the first checkpoint, when this is written."""

    name = "mortal"
    directory: str

    def after_step(self, model, step):
        mark = Path(self.directory) / "mark"
        if step == 3 and os.environ.get("RANK") == "1" and not mark.exists():
            while not (mark.parent / "run" / files.CHECKPOINTS / "step-000002").exists():
                time.sleep(0.01)
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@attrs.frozen(kw_only=True)
class Brittle(tk.LoRA):
    """LoRA that no worker can use; it says so before anything heavy is imported."""

    name = "brittle"

    def check(self, context):
        if "RAY_JOB_ID" in os.environ:
            raise tk.NotSupported("not on a cluster")


@attrs.define
class Marks:
    """An observer that makes a file once training has begun."""

    mark: str

    @tk.hookimpl
    def tunekit_log(self, step):
        if step == 2:
            Path(self.mark).touch()


def make(adapter, model=tk.TINY, **changes):
    parts = {"model": str(model), "data": tk.InMemory(rows=ROWS), "validation": tk.InMemory(rows=ROWS[:2])}
    return tk.Pipeline(**{**parts, "adapter": adapter, "trainer": TRAINER, "device": "cpu", **changes})


def weights(directory):
    return load_file(directory / files.ADAPTER / "adapter_model.safetensors")


def difference(left, right):
    left, right = weights(left), weights(right)
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


@pytest.fixture(scope="module")
def cluster(cache):
    """A Ray of two cores on this machine. It tells nobody, and writes no token into the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32))
        import ray

        # The classes of this module are sent along: the workers cannot import it.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def killed(cluster, tiny_directory, tmp_path_factory):
    """A run by two workers, of which one was killed."""
    directory = tmp_path_factory.mktemp("killed")
    pipeline = make(Mortal(rank=2, directory=str(directory)), tiny_directory)
    return pipeline.run(directory / "run", on=tk.Ray(workers=2))


@needs_ray
def test_a_run_goes_on_from_its_last_checkpoint_when_a_worker_is_killed(killed):
    log = (killed.directory / files.LOG).read_text(encoding="utf-8")
    assert "worker 1 of 2, process" in log
    assert "started again, 1 of at most 3 times" in log
    assert [resumed["step"] for resumed in killed.result["resumes"]] == [2]
    assert [line["step"] for line in killed.history if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert not (killed.directory / lock.LOCK).exists()


@needs_ray
def test_two_workers_of_which_one_was_killed_end_with_the_parameters_of_one_process(killed, tiny_directory, tmp_path):
    here = make(tk.LoRA(rank=2), tiny_directory).run(tmp_path / "here")
    assert difference(killed.directory, here.directory) < 1e-6
    assert killed.metrics == pytest.approx(here.metrics, rel=1e-5)
    assert killed.generate("repeat 1", max_new_tokens=4) == here.generate("repeat 1", max_new_tokens=4)


@needs_ray
def test_a_comparison_on_a_cluster_has_the_numbers_of_one_here(cluster, tmp_path):
    pipeline, method = make(tk.LoRA()), tk.LoRA(rank=2)
    here = tk.compare(pipeline, (method,), directory=tmp_path / "here", budget=tk.Steps(3))
    parts = {"directory": tmp_path / "there", "budget": tk.Steps(3), "on": tk.Ray()}
    there = tk.compare(pipeline, (Brittle(), method), **parts)

    brittle, (mine,), (its,) = there.arms[0].runs[0], here.arms[0].runs, there.arms[1].runs
    assert brittle.error == "NotSupported: not on a cluster"  # and the other was made
    assert here.arms[0].name == there.arms[1].name
    assert its.metrics == pytest.approx(mine.metrics, rel=1e-6)
    assert its.trainable_parameters == mine.trainable_parameters
    assert its.tokens_per_second > 0  # measured where the run was

    finished = tmp_path / "there" / there.arms[1].name / "seed-0" / files.RESULT
    before = finished.stat().st_mtime_ns
    again = tk.compare(pipeline, (method,), **parts)
    assert again.arms == there.arms[1:]
    assert finished.stat().st_mtime_ns == before  # finished runs are not made again


@needs_ray
def test_an_interrupt_here_makes_the_workers_save(cluster, tmp_path):
    def interrupt():
        while not (tmp_path / "mark").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    long = make(tk.LoRA(rank=2), trainer=attrs.evolve(TRAINER, epochs=300, save_every=None))
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            long.run(tmp_path / "run", observers=[Marks(str(tmp_path / "mark"))], on=tk.Ray())
    finally:
        signal.signal(signal.SIGINT, former)
    assert checkpoint.newest(tmp_path / "run" / files.CHECKPOINTS).step >= 2
    assert "stopped by SystemExit: 143" in (tmp_path / "run" / files.LOG).read_text(encoding="utf-8")


@needs_ray
def test_what_cannot_be_sent_is_named(cluster, tmp_path):
    class Holds:
        def __init__(self):
            self.lock = threading.Lock()

    with pytest.raises(tk.ConfigError, match=r"run\.observers\[0\]: Holds cannot be sent"):
        make(tk.LoRA()).run(tmp_path / "run", observers=[Holds()], on=tk.Ray())


@needs_ray
def test_a_worker_finds_relative_paths_where_they_were_and_misses_a_run_directory_that_is_not_shared(
    tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    sent = Job(pipeline=make(tk.LoRA()), directory=Path("run")).packed()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tk.ConfigError, match=r"here.run is not there; .* all machines see"):
        Job.unpacked(sent)
    (tmp_path / "here" / "run").mkdir()
    assert Job.unpacked(sent).pipeline == make(tk.LoRA())
    assert Path.cwd() == tmp_path / "here"


@needs_ray
def test_a_run_that_the_cluster_has_no_room_for_says_what_it_asks_for(cluster, tmp_path, monkeypatch):
    from tunekit.core.remote import gang

    monkeypatch.setattr(gang, "SOON", 0.0)
    monkeypatch.setattr(gang, "PATIENCE", 0.0)
    with pytest.raises(tk.ConfigError, match=r"asks for 3 CPU, and the cluster has 2 CPU"):
        make(tk.LoRA()).run(tmp_path / "run", on=tk.Ray(workers=3))


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:head"])
def test_an_address_at_which_nobody_listens_is_named_at_once(address, monkeypatch, tmp_path):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(tk.ConfigError, match=f"Ray.address: no Ray cluster answers at '{address}'"):
        make(tk.LoRA()).run(tmp_path / "run", on=tk.Ray(address=address))
    assert not (tmp_path / "run").exists()


def test_without_ray_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    with pytest.raises(tk.ConfigError, match=r'pip install "tunekit-sdk\[ray\]"'):
        make(tk.LoRA()).run(tmp_path / "run", on=tk.Ray())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"workers": 0}, "Ray.workers: must be at least 1"),
        ({"workers": "2"}, "Ray.workers: expected int"),
        ({"gpus_per_worker": 2}, "Ray.gpus_per_worker: a worker uses one GPU"),
        ({"gpus_per_worker": 0.5, "workers": 2}, "cannot share a GPU"),
        ({"gpus_per_worker": -1}, "Ray.gpus_per_worker: must be at least 0"),
        ({"cpus_per_worker": 0}, "Ray.cpus_per_worker: must be at least 1"),
        ({"max_restarts": -1}, "Ray.max_restarts: must be at least 0"),
        ({"address": "ray://head:10001"}, "Ray.address: .*on the cluster"),
    ],
)
def test_a_field_that_cannot_be_is_refused(fields, message):
    with pytest.raises(tk.ConfigError, match=message):
        tk.Ray(**fields)


def test_a_launcher_and_a_cluster_at_once_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(tk.NotSupported, match="one process"):
        make(tk.LoRA()).run(tmp_path / "run", on=tk.Ray())


@pytest.fixture
def doomed(monkeypatch):
    """Workers that die each time: what they were sent, without any Ray."""
    sent = []

    def dies(gang, packed):
        gang.where = [place(node="a", pid=1)]
        sent.append(packed)
        raise Lost("worker 1 of 2, process 7 on c", "bad luck")

    monkeypatch.setattr(remote, "connect", lambda address: None)
    monkeypatch.setattr(remote.Gang, "make", dies)
    monkeypatch.setattr(remote.Job, "packed", lambda job: job)
    return sent


def test_a_run_whose_workers_keep_dying_stops_and_says_which_one_and_why(doomed, tmp_path):
    with pytest.raises(tk.TrainingError, match=r"worker 1 of 2, process 7 on c died: bad luck; .* 2 times"):
        make(tk.LoRA()).run(tmp_path / "run", on=tk.Ray(workers=2, max_restarts=2))
    assert [job.resume for job in doomed] == [False] * 3  # there was nothing yet to go on from
    files.check_free(tmp_path / "run")  # it is as free as it was


def test_a_lock_that_a_worker_of_another_machine_left_is_taken_away(doomed, tmp_path):
    directory = tmp_path / "run"
    files.create(directory)
    (directory / lock.LOCK).write_text('{"host": "host-a", "pid": 1, "started": 0}')
    (directory / files.RECIPE).touch()
    with pytest.raises(tk.TrainingError):
        make(tk.LoRA()).run(directory, resume=True, on=tk.Ray(max_restarts=1))
    assert not (directory / lock.LOCK).exists()
    assert "started again, 1 of at most 1 times" in (directory / files.LOG).read_text(encoding="utf-8")


def place(node, pid):
    return Whereabouts(host=f"host-{node}", pid=pid, address=f"10.0.0.{pid}", port=4000 + pid, node=node, worker="w")


def test_workers_find_in_their_environment_what_torchrun_would_set():
    found = variables([place("a", 1), place("b", 2), place("a", 3)], gpus=0)
    assert [each["RANK"] for each in found] == ["0", "1", "2"]
    assert [each["LOCAL_RANK"] for each in found] == ["0", "0", "1"]
    assert [each["LOCAL_WORLD_SIZE"] for each in found] == ["2", "1", "2"]
    assert {(each["WORLD_SIZE"], each["MASTER_ADDR"], each["MASTER_PORT"]) for each in found} == {
        ("3", "10.0.0.1", "4001")
    }
    assert {each["CUDA_VISIBLE_DEVICES"] for each in found} == {""}


def test_workers_with_a_gpu_each_see_it_alone_and_take_the_first_they_see():
    found = variables([place("a", 1), place("a", 2)], gpus=1)
    assert [each["LOCAL_RANK"] for each in found] == ["0", "0"]
    assert all("CUDA_VISIBLE_DEVICES" not in each for each in found)
    alone = variables([place("a", 1)], gpus=1)  # one that is alone is not a distributed process
    assert alone == [{"TUNEKIT_CPU_DTYPE": "float32"}]


@pytest.mark.parametrize(("said", "told"), [("bfloat16", {"TUNEKIT_CPU_DTYPE": "bfloat16"}), (None, {})])
def test_workers_hold_the_base_in_the_dtype_named_where_the_run_was_asked_for(said, told, monkeypatch):
    monkeypatch.delenv("TUNEKIT_CPU_DTYPE")
    if said:
        monkeypatch.setenv("TUNEKIT_CPU_DTYPE", said)
    for workers in ([place("a", 1)], [place("a", 1), place("b", 2)]):
        for each in variables(workers, gpus=0):
            assert {name: value for name, value in each.items() if name.startswith("TUNEKIT")} == told
