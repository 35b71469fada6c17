"""One process writes into a run directory; the lock of one that died is taken over, and the others are told who has it."""

import json
import os
import platform
import subprocess
import sys
import threading
import time

import psutil
import pytest

from tunekit import ConfigError, RunExists
from tunekit.core.run import lock


def write(directory, **fields):
    mine = {"host": platform.node(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    (directory / lock.LOCK).write_text(json.dumps({**mine, **fields}))


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_lock_is_there_for_as_long_as_it_is_held(tmp_path):
    with lock.held(tmp_path) as note:
        assert note == ""
        assert json.loads((tmp_path / lock.LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_it_is_given_back_when_what_it_was_for_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), lock.held(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_told_host_and_number_of_the_first(tmp_path):
    script = "import sys, pathlib; from tunekit.core.run import lock\nwith lock.held(pathlib.Path(sys.argv[1])): print(1, flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "1\n"
        with (
            pytest.raises(RunExists, match=rf"is in use by process {child.pid} on {platform.node()}, running since 20"),
            lock.held(tmp_path),
        ):
            pass
        assert (tmp_path / lock.LOCK).exists(), "the lock of the other is left alone"
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
    with lock.held(tmp_path) as note:
        assert note.startswith(f"took over the lock of process {child.pid} on {platform.node()}")


def test_this_very_process_cannot_have_it_twice(tmp_path):
    problems = []

    def again():
        try:
            with lock.held(tmp_path):
                pass
        except RunExists as error:
            problems.append(str(error))

    with lock.held(tmp_path):
        thread = threading.Thread(target=again)
        thread.start()
        thread.join()
    assert f"is in use by process {os.getpid()}" in problems[0]


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, dead):
    write(tmp_path, pid=dead)
    with lock.held(tmp_path) as note:
        assert f"took over the lock of process {dead} on {platform.node()}" in note


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps no process that has ended for its parent to look at")
def test_a_process_that_ended_and_was_not_waited_for_is_gone(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write(tmp_path, pid=child.pid, started=psutil.Process(child.pid).create_time())
    with pytest.raises(RunExists), lock.held(tmp_path):
        pass
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with lock.held(tmp_path) as note:
        assert "took over" in note
    child.wait()
    child.stdin.close()


def test_a_process_number_that_was_given_again_is_another_process(tmp_path):
    write(tmp_path, started=1e9)
    with lock.held(tmp_path) as note:
        assert "running since 2001-09-09T01:46:40+00:00 that is gone" in note


def test_of_a_process_on_another_machine_nothing_is_presumed(tmp_path, dead):
    write(tmp_path, host="elsewhere", pid=dead)
    with (
        pytest.raises(RunExists, match=rf"process {dead} on elsewhere.* If it runs no more, delete .*{lock.LOCK}"),
        lock.held(tmp_path),
    ):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "x"}'])
def test_a_lock_that_says_nothing_was_left_by_a_process_that_died(tmp_path, text, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    (tmp_path / lock.LOCK).write_text(text)
    with lock.held(tmp_path) as note:
        assert note == "took over the lock of a process that is gone"


def test_a_directory_that_cannot_be_written_is_an_error_with_its_path(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot write .*gone/run.lock"), lock.held(tmp_path / "gone"):
        pass


RACE = """
import json, os, pathlib, platform, sys, time
from tunekit.core.run import lock
from tunekit.errors import RunExists
import psutil
directory, dead = pathlib.Path(sys.argv[1]), int(sys.argv[2])
for n in range(40):
    place = directory / str(n)
    place.mkdir()
    (place / lock.LOCK).write_text(json.dumps({"host": platform.node(), "pid": dead, "started": 1.0}))
start = time.monotonic() + 0.3
for _ in range(4):
    if os.fork() == 0:
        while time.monotonic() < start:
            pass
        held = []
        for n in range(40):
            try:
                held.append(lock.held(directory / str(n)))
                held[-1].__enter__()
                (directory / str(n) / f"had.{os.getpid()}").write_text("")
            except RunExists:
                pass
        (directory / f"done.{os.getpid()}").write_text("")
        while len(list(directory.glob("done.*"))) < 4:
            time.sleep(0.01)
        os._exit(0)
for _ in range(4):
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the race is run by os.fork, which is not there")
def test_of_several_processes_that_find_a_stale_lock_one_takes_it(tmp_path, dead):
    subprocess.run([sys.executable, "-c", RACE, str(tmp_path), str(dead)], check=True, timeout=60)
    assert [len(list((tmp_path / str(n)).glob("had.*"))) for n in range(40)] == [1] * 40
