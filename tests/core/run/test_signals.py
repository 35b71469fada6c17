"""A first signal waits for the step, a second does not, and the handlers that were there are there again."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

import tunekit as tk
from tunekit.core.run import checkpoint, files
from tunekit.core.run.signals import SIGNALS, asked_to_stop

ROWS = [{"prompt": f"repeat {n}", "completion": f"{n} {n}"} for n in range(12)]
ADAPTER = "adapter/adapter_model.safetensors"

in_main_thread = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="Python handles signals in the main thread only"
)


def make(tiny_directory):
    trainer = tk.SFT(epochs=2, batch_size=3, learning_rate=0.01)
    return tk.Pipeline(
        model=str(tiny_directory), data=tk.InMemory(rows=ROWS), adapter=tk.LoRA(rank=2, dropout=0.1), trainer=trainer
    )


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.fixture(autouse=True)
def former():
    """The handlers before a test, which must be those after it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # these tests run in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = handlers()
    yield before
    after = handlers()
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@in_main_thread
@pytest.mark.parametrize(
    ("number", "expected", "code"),
    [(signal.SIGINT, KeyboardInterrupt, None), (signal.SIGTERM, SystemExit, 143)],
)
def test_a_first_signal_is_noted_and_leads_out_when_the_step_is_done(number, expected, code, capfd, former):
    with pytest.raises(expected) as caught, asked_to_stop() as asked:  # noqa: PT012
        asked.leave()  # nobody asked yet
        signal.raise_signal(number)
        assert asked.by is number
        assert handlers() == former, "a second one goes where it would have gone"
        asked.leave()
    assert getattr(caught.value, "code", None) == code
    assert f"{number.name}: finishing this step" in capfd.readouterr().err


@in_main_thread
def test_a_second_signal_is_not_held_back(capfd):
    with pytest.raises(KeyboardInterrupt), asked_to_stop() as asked:  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")
    assert asked.by is signal.SIGTERM


@in_main_thread
def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with asked_to_stop() as asked:
            signal.raise_signal(signal.SIGINT)
            assert asked.by is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_changed(former):
    seen = []

    def work():
        with asked_to_stop() as asked:
            seen.append((handlers(), asked.by))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(former, None)]


@in_main_thread
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_run_that_is_asked_to_stop_saves_its_step_and_goes_on_to_the_same_end(
    tiny_directory, tmp_path, number, expected, former
):
    class Asks:
        @tk.hookimpl
        def tunekit_log(self, step):
            if step == 3:
                signal.raise_signal(number)

    pipeline = make(tiny_directory)
    whole = pipeline.run(tmp_path / "whole")
    with pytest.raises(expected):
        pipeline.run(tmp_path / "run", observers=[Asks()])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    assert [line["step"] for line in files.history(tmp_path / "run")] == [1, 2, 3]
    assert not (tmp_path / "run" / "run.lock").exists()
    assert f"stopped by {expected.__name__}" in (tmp_path / "run" / "log.txt").read_text()
    resumed = pipeline.run(tmp_path / "run", resume=True)
    assert resumed.history == whole.history
    assert resumed.metrics == whole.metrics
    assert (resumed.directory / ADAPTER).read_bytes() == (whole.directory / ADAPTER).read_bytes()


@in_main_thread
def test_a_run_that_is_asked_to_stop_at_its_last_step_only_has_to_be_ended(tiny_directory, tmp_path):
    class Asks:
        @tk.hookimpl
        def tunekit_log(self, step):
            if step == 8:
                signal.raise_signal(signal.SIGINT)

    pipeline = make(tiny_directory)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(tmp_path / "run", observers=[Asks()])
    resumed = pipeline.run(tmp_path / "run", resume=True)
    assert resumed.history == pipeline.run(tmp_path / "whole").history
    assert resumed.result["training"] == {"steps": 8, "loss": resumed.history[-1]["loss"], "skipped_steps": 0}


SCRIPT = """
import os, signal, sys, time
import accelerate, peft, transformers  # once, for all that are to be told
import tunekit as tk

for directory in sys.argv[2:]:
    child = os.fork()
    if not child:
        break
    print(child, flush=True)
else:
    for _ in sys.argv[2:]:
        child, status = os.wait()
        print(child, os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started with it ignored

class Slow:
    @tk.hookimpl
    def tunekit_log(self, step):
        time.sleep(0.3)

rows = [{"prompt": f"repeat {n}", "completion": f"{n} {n}"} for n in range(12)]
tk.Pipeline(model=sys.argv[1], data=tk.InMemory(rows=rows), trainer=tk.SFT(max_steps=500, save_every=2)).run(
    directory, observers=[Slow()]
)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are made by os.fork, which is not there")
def test_processes_that_are_told_to_end_do_so_within_ten_seconds(tiny_directory, tmp_path):
    told = {
        "SIGTERM": ([signal.SIGTERM], {143}),
        # Python's own way to end by KeyboardInterrupt: 130 in a shell, or 1 if a library has work to do at exit.
        "SIGINT": ([signal.SIGINT], {-signal.SIGINT, 1}),
        "twice": (
            [signal.SIGTERM, signal.SIGTERM],
            {-signal.SIGTERM},
        ),  # by the operating system, whatever it was doing
    }
    command = [sys.executable, "-c", SCRIPT, str(tiny_directory), *(str(tmp_path / name) for name in told)]
    pids: list[int] = []
    codes: dict[int, int] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        try:
            pids.extend(int(parent.stdout.readline()) for _ in told)
            end = time.monotonic() + 120
            saved = [tmp_path / name / "checkpoints" / "step-000002" for name in told]
            while not all(map(Path.exists, saved)) and time.monotonic() < end:
                time.sleep(0.05)
            sent = time.monotonic()
            for pid, (signals, _) in zip(pids, told.values(), strict=True):
                for number in signals:
                    os.kill(pid, number)
                    time.sleep(0.05)
            codes.update(map(int, parent.stdout.readline().split()) for _ in told)
            took = time.monotonic() - sent
        finally:
            parent.kill()
            for pid in set(pids).difference(codes):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert took < 10
    for pid, (name, (signals, expected)) in zip(pids, told.items(), strict=True):
        assert codes[pid] in expected, name
        newest = checkpoint.newest(tmp_path / name / "checkpoints")
        if len(signals) == 1:
            assert newest.step == files.history(tmp_path / name)[-1]["step"]
            assert not (tmp_path / name / "run.lock").exists()
