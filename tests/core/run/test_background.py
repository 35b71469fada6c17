"""Checkpoints that are written beside training: as training left them, and what goes wrong is not lost."""

import threading

import pytest
from safetensors.torch import load_file

import tunekit as tk
from tunekit.core.run import background, checkpoint

ROWS = [{"prompt": f"repeat {n}", "completion": f"{n} {n}"} for n in range(12)]


def make(model, **fields):
    trainer = tk.SFT(max_steps=4, batch_size=3, learning_rate=0.01, save_every=1, keep=9, **fields)
    return tk.Pipeline(
        model=str(model), data=tk.InMemory(rows=ROWS), validation=0, adapter=tk.LoRA(rank=2), trainer=trainer
    )


def saved(directory):
    return {place.name: load_file(place / checkpoint.PARAMETERS) for place in (directory / "checkpoints").iterdir()}


def test_training_goes_on_while_a_checkpoint_is_written_and_the_checkpoint_is_of_its_step(
    tiny_directory, tmp_path, monkeypatch
):
    write, logged = checkpoint.write, threading.Event()

    def slowly(directory, step, parameters, state):
        assert logged.wait(timeout=60), "the next step was not taken while this was written"
        return write(directory, step, parameters, state)

    class Logged:
        @tk.hookimpl
        def tunekit_log(self, step):
            if step == 2:
                logged.set()

    plain = make(tiny_directory, background_saving=False).run(tmp_path / "plain")
    monkeypatch.setattr(checkpoint, "write", slowly)
    run = make(tiny_directory).run(tmp_path / "run", observers=[Logged()])
    beside, waited_for = saved(run.directory), saved(plain.directory)
    assert beside.keys() == waited_for.keys() == {"step-000001", "step-000002", "step-000003"}
    for place, parameters in waited_for.items():
        assert all(beside[place][name].equal(value) for name, value in parameters.items())
    log = (run.directory / "log.txt").read_text()
    assert [log.index(f"saved step-00000{step}") for step in (1, 2, 3)] == sorted(
        log.index(f"saved step-00000{step}") for step in (1, 2, 3)
    )


def test_what_goes_wrong_beside_training_stops_the_run_with_the_place(tiny_directory, tmp_path, monkeypatch):
    write = checkpoint.write

    def full(directory, step, parameters, state):
        if step == 2:
            raise OSError(28, "No space left on device")
        return write(directory, step, parameters, state)

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(tk.TrainingError, match=r"step-000002.*No space left"):
        make(tiny_directory).run(tmp_path / "run")
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 1
    assert make(tiny_directory).run(tmp_path / "run", resume=True).result["training"]["steps"] == 4


def test_without_room_for_a_copy_training_waits(tiny_directory, tmp_path, monkeypatch):
    threads = []
    write = checkpoint.write

    def noting(*arguments):
        threads.append(threading.current_thread())
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write", noting)
    monkeypatch.setattr(background, "SPARE", 2**60)
    make(tiny_directory).run(tmp_path / "run")
    assert set(threads) == {threading.main_thread()}


def test_one_thing_at_a_time_and_each_outcome_once():
    beside = background.Background()
    assert beside.settle() == []
    beside.start(lambda: 5)
    assert beside.settle() == [5]
    assert beside.settle() == []
    beside.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        beside.settle()
    assert not beside.succeeded
