"""Only training is timed, and only tokens of the steps that were timed are counted."""

import json
import re
from pathlib import Path

import psutil
import pytest

from tunekit.core.run import gauge
from tunekit.core.run.gauge import Gauge
from tunekit.core.run.run_log import RunLog

MOST_RESIDENT = gauge.most_resident


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(gauge.time, "monotonic", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


@pytest.fixture(autouse=True)
def most(monkeypatch):
    """What the process had at most is set here: other tests may have needed more than any of these."""
    bytes_ = [5000 * 2**20]
    monkeypatch.setattr(gauge, "most_resident", lambda: bytes_[0])
    return bytes_


def run_in(directory, resumed=None):
    return RunLog(directory=directory, observers=None, resumed=resumed)


def finish(found, directory, resumed=None):
    found.tunekit_run_finished(run=run_in(directory, resumed), error=None)
    return json.loads((directory / gauge.MEASURED).read_text(encoding="utf-8"))


def test_the_first_step_evaluations_and_checkpoints_are_left_out(tmp_path, clock):
    found = Gauge("cpu", iter([1000, 10, 20, 30, 40, 5000]))
    found.tunekit_run_started()
    clock(50)  # loading, the base's evaluation, the first step
    found.tunekit_log(run=run_in(tmp_path), step=1, metrics={"loss": 1.0})
    clock(2)
    found.tunekit_log(run=run_in(tmp_path), step=3, metrics={"loss": 1.0})  # steps 2 and 3, 30 tokens in 2 seconds
    clock(7)
    found.tunekit_log(run=run_in(tmp_path), step=3, metrics={"validation/perplexity": 1.0})
    clock(5)
    found.tunekit_saved(step=3)
    clock(1)
    found.tunekit_log(run=run_in(tmp_path), step=4, metrics={"loss": 1.0})  # 30 tokens in 1 second
    found.tunekit_saved(step=3)  # written beside training, which has gone on
    clock(35)
    assert finish(found, tmp_path) == {
        "tokens_per_second": 60 / 3,
        "training_seconds": 4.0,  # 3 seconds for 3 steps, and the first one at their speed
        "peak_memory": None,
        "process_growth": None,
        "seconds": 100.0,
    }
    lines = gauge.pace(tmp_path)
    assert [(line["step"], line["tokens_per_second"]) for line in lines] == [(3, 15.0), (4, 30.0)]
    assert all(line["memory"] > 2**20 for line in lines)


def test_a_resumed_run_counts_the_tokens_of_its_own_steps_and_no_time_of_the_whole(tmp_path, clock):
    found = Gauge("cpu", iter([1, 2, 4, 8, 16]))
    found.tunekit_run_started()
    clock(3)
    found.tunekit_log(run=run_in(tmp_path), step=3, metrics={"loss": 1.0})
    clock(2)
    found.tunekit_log(run=run_in(tmp_path), step=5, metrics={"loss": 1.0})
    assert finish(found, tmp_path, resumed="a checkpoint") == {
        "tokens_per_second": 24 / 2,
        "training_seconds": None,
        "peak_memory": None,
        "process_growth": None,
        "seconds": None,
    }


@pytest.mark.parametrize("tokens", [None, iter([5])])
def test_what_cannot_be_known_is_null(tmp_path, clock, tokens):
    found = Gauge("cpu", tokens)
    found.tunekit_run_started()
    clock(3)
    found.tunekit_log(run=run_in(tmp_path), step=1, metrics={"loss": 1.0})
    assert finish(found, tmp_path)["tokens_per_second"] is None


def test_a_run_that_failed_leaves_nothing(tmp_path):
    found = Gauge("cpu", None)
    found.tunekit_run_started()
    found.tunekit_run_finished(run=RunLog(directory=tmp_path, observers=None), error=ValueError())
    assert not list(tmp_path.iterdir())


def test_the_growth_of_the_process_is_its_new_peak_less_what_it_had_before(tmp_path, most):
    found = Gauge("cpu", None)
    found.tunekit_run_started()
    before = psutil.Process().memory_info().rss
    assert finish(found, tmp_path)["process_growth"] is None, "it had more before the run"
    most[0] += 10 * 2**20
    assert finish(found, tmp_path)["process_growth"] == pytest.approx(most[0] - before, abs=2**20)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says it a second time")
def test_the_most_that_the_process_ever_had_is_what_linux_says_of_it():
    status = Path("/proc/self/status").read_text()
    kibibytes = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    # At least: the system counts what the process was before it became this program.
    assert 0.98 * 1024 * kibibytes < MOST_RESIDENT() < psutil.virtual_memory().total
