"""One thread of a process works with models at a time; a forked child has turns, and threads, of its own."""

import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest
import torch

import tunekit as tk
from tunekit.core.common import turns

ROWS = [{"prompt": f"repeat {n}", "completion": f"{n} {n}"} for n in range(12)]


def pipeline(model: Path | str, seed: int, **changes: object) -> tk.Pipeline:
    parts = {"adapter": tk.LoRA(rank=2, dropout=0.1), "trainer": tk.SFT(max_steps=3, batch_size=4), "validation": 0.25}
    return tk.Pipeline(model=str(model), data=tk.InMemory(rows=ROWS), seed=seed, **{**parts, **changes})


def planned(pipe: tk.Pipeline) -> tk.Plan:
    """Its plan, without how much memory is free just then."""
    return attrs.evolve(pipe.plan(), available=None)


# Threads ---------------------------------------------------------------------------------------------------------------


def test_what_threads_do_with_models_at_once_gives_what_it_gives_alone(tiny_directory, tmp_path):
    one, other = (pipeline(tiny_directory, seed, dtype="bfloat16") for seed in (0, 1))
    before = {seed: pipe.run(tmp_path / f"alone-{seed}") for seed, pipe in enumerate((one, other))}
    answer, plan = before[0].generate("repeat 3", max_new_tokens=4), planned(one)
    jobs = [
        lambda: one.run(tmp_path / "threads-0"),
        lambda: other.run(tmp_path / "threads-1"),
        lambda: planned(one),
        lambda: tk.open_run(tmp_path / "alone-0").generate("repeat 3", max_new_tokens=4),
        lambda: str(before[0].export(tmp_path / "exported")),
    ]
    with ThreadPoolExecutor(len(jobs)) as threads:
        runs = [made.result() for made in [threads.submit(job) for job in jobs]]
    for run, alone in zip(runs, before.values(), strict=False):
        assert run.history == alone.history
        assert run.metrics == alone.metrics
        name = "adapter/adapter_model.safetensors"
        assert (run.directory / name).read_bytes() == (alone.directory / name).read_bytes()
    assert runs[2:] == [plan, answer, str(tmp_path / "exported")]
    assert torch.get_default_dtype() is torch.float32
    logs = [(tmp_path / f"threads-{seed}" / "log.txt").read_text() for seed in (0, 1)]
    assert sum("one at a time works with models" in log for log in logs) >= 1
    assert "one at a time" not in (tmp_path / "alone-1" / "log.txt").read_text()


def test_turns_are_taken_one_after_the_other_and_a_thread_that_has_one_has_it_again(caplog, monkeypatch):
    monkeypatch.setattr(turns, "PATIENCE", 0.02)
    inside: list[str] = []

    def work(name: str) -> list[str]:
        with turns.turn(name):
            inside.append(name)
            with turns.turn(f"{name}, a part of it"):
                time.sleep(0.1)
                assert inside == [name]
            inside.remove(name)
            return turns.notes()

    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(2) as threads:
        first, second = [made.result() for made in [threads.submit(work, name) for name in ("first", "second")]]
    assert first == []
    assert len(second) == 1
    assert second[0].endswith("for first in another thread: one at a time works with models")
    assert [record.getMessage() for record in caplog.records] == [
        "second waits until another thread of this process is done with first"
    ]
    with turns.turn("third"):
        assert turns.notes() == []


def test_a_turn_ends_with_what_was_done_in_it_however_that_ends():
    for error in (RuntimeError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), turns.turn("first"):
            raise error
    free: list[bool] = []

    def look() -> None:
        with turns.turn("second"):
            free.append(turns.notes() == [])

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(10)
    assert free == [True]


def test_a_pipeline_that_cannot_work_is_refused_without_waiting_for_a_turn(tiny_directory):
    wrong = pipeline(tiny_directory, 0, validation=2.0)
    with turns.turn("something long"), ThreadPoolExecutor(1) as threads:
        error = threads.submit(wrong.plan).exception(10)
    assert isinstance(error, tk.ConfigError)
    assert "a share must be in" in str(error)


# Forks -----------------------------------------------------------------------------------------------------------------

FORK = """
import os, sys, threading, time, traceback
import torch
import tunekit as tk
from tunekit.core.common import turns

torch.set_num_threads(3)
torch.randn(300, 300) @ torch.randn(300, 300)
torch.get_num_threads()

def in_a_child(work):
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no os.fork")
def test_a_child_trains_as_its_parent_does_though_another_thread_of_the_parent_has_the_turn(tiny_directory, tmp_path):
    script = f"""{FORK}
rows = [{{"prompt": f"repeat {{n}}", "completion": f"{{n}} {{n}}"}} for n in range(8)]
parts = {{"adapter": tk.LoRA(rank=2), "trainer": tk.SFT(max_steps=2, batch_size=4), "validation": 0}}
pipeline = tk.Pipeline(model={str(tiny_directory)!r}, data=tk.InMemory(rows=rows), dtype="bfloat16", **parts)
with turns.turn("computing with three threads"):
    torch.randn(300, 300) @ torch.randn(300, 300)
    torch.randn(300, 300).exp().sum()

def train():
    pipeline.run("child")
    assert torch.get_num_threads() == 1

done = threading.Event()
def hold():
    with turns.turn("something long"):
        done.wait()

holder = threading.Thread(target=hold)
holder.start()
time.sleep(0.1)
in_a_child(train)
done.set()
holder.join()
torch.set_num_threads(1)
assert pipeline.run("parent").history == tk.open_run("child").history
assert "those of the process that this one was forked from are not here" in open("child/log.txt").read()
assert "forked" not in open("parent/log.txt").read()
"""
    made = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_the_threads_of_torch_are_there_in_a_child_before_anything_is_loaded(tmp_path):
    script = f"""{FORK}
def are(count):
    until = time.monotonic() + 10  # one that has ended is listed for a moment
    while len(os.listdir("/proc/self/task")) != count and time.monotonic() < until:
        time.sleep(0.01)
    return len(os.listdir("/proc/self/task")) == count

def look():
    assert are(1) and torch.get_num_threads() == 3, "torch makes them by itself by now: the turn need not"
    with turns.turn("anything"):
        assert are(3) and torch.get_num_threads() == 3

here = len(os.listdir("/proc/self/task"))
in_a_child(look)
with turns.turn("anything"):
    assert are(here) and torch.get_num_threads() == 3
"""
    made = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr


# Spoilt installations --------------------------------------------------------------------------------------------------


def test_where_torch_cannot_be_imported_for_a_spoilt_package_the_error_names_it(tmp_path):
    spoilt = tmp_path / "spoilt-1.5.dist-info"
    spoilt.mkdir()
    (spoilt / "METADATA").write_text("Metadata-Version: 2.1\nName: Spoilt\nVersion: 1.5\n")
    (spoilt / "entry_points.txt").write_text("[console_scripts]\nnot a point\n")
    script = """
import sys
sys.path.insert(0, ".")
import tunekit as tk
rows = [{"prompt": "a", "completion": "b"}] * 4
try:
    tk.Pipeline(model=tk.TINY, data=tk.InMemory(rows=rows), validation=0).plan()
except tk.ConfigError as error:
    print(error)
"""
    made = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert made.stdout.startswith(
        "installed packages: torch cannot be imported, which reads the entry points of all packages: "
        "Spoilt 1.5: its entry_points.txt cannot be read: line 2, 'not a point', is not an entry point"
    )
