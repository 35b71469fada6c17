"""As many threads as do not get in each other's way, where nobody says how many: as measured, or as the run began."""

import psutil
import pytest
import torch

import tunekit as tk
from tunekit.core.common import threads
from tunekit.core.common.threads import most_useful, settled
from tunekit.testing.harness import ROWS


@pytest.fixture(autouse=True)
def four(monkeypatch):
    """A machine of four cores on which nobody has said how many threads to take."""
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 4)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    threads.fewest_in_the_way.cache_clear()
    yield
    threads.fewest_in_the_way.cache_clear()
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("times", "count"),
    [
        ({4: 1.0, 2: 2.0, 1: 4.0}, 4),
        ({4: 1.5, 2: 1.0, 1: 9.9}, 4),
        ({4: 1.6, 2: 1.0, 1: 1.9}, 2),
        ({4: 14.0, 2: 9.0, 1: 1.0}, 1),
    ],
)
def test_half_as_many_are_taken_while_they_are_clearly_quicker(times, count):
    found, measured = most_useful(4, lambda number, there: times[number])
    assert found == count
    assert measured == {number: time for number, time in times.items() if number >= min(count, 4) // 2}


def test_one_bad_moment_changes_nothing():
    given = {4: iter([1.0, 50.0, 1.0, 50.0, 1.0]), 2: iter([2.0] * 5)}
    assert most_useful(4, lambda number, there: next(given[number]))[0] == 4


def busy(monkeypatch, times):
    monkeypatch.setattr(threads, "_time", lambda number, there: times[number])


def test_a_busy_machine_gets_fewer_and_is_told_and_what_was_there_before_is_there_again(monkeypatch):
    busy(monkeypatch, {4: 14.0, 2: 9.0, 1: 1.0})
    with settled("cpu") as choice:
        assert torch.get_num_threads() == 1
        assert choice == {
            "threads": "1 of 4, since the machine is busy: a small product takes 14 ms with 4, 1 ms with 1; "
            "OMP_NUM_THREADS in the environment settles it"
        }
    assert torch.get_num_threads() == 4
    busy(monkeypatch, {4: 1.0, 2: 2.0, 1: 4.0})
    with settled("cpu") as choice:
        assert torch.get_num_threads() == 1, "two runs of one process compute the same"


def test_an_idle_machine_keeps_all_and_says_nothing(monkeypatch):
    busy(monkeypatch, {4: 1.0, 2: 2.0, 1: 4.0})
    with settled("cpu") as choice:
        assert (torch.get_num_threads(), choice) == (4, {})


def test_what_the_user_has_chosen_is_left_alone(monkeypatch):
    monkeypatch.setattr(threads, "_time", lambda number, there: pytest.fail("measured"))
    monkeypatch.setattr(threads, "VARIABLES", ("TUNEKIT_TEST_THREADS",))
    with settled("cuda:0", before=1) as choice:
        assert (torch.get_num_threads(), choice) == (4, {})
    with settled("cpu", before=1, processes=2) as choice:
        assert (torch.get_num_threads(), choice) == (4, {})
    torch.set_num_threads(3)
    with settled("cpu", before=1) as choice:
        assert (torch.get_num_threads(), choice) == (3, {})
    torch.set_num_threads(4)
    monkeypatch.setenv("TUNEKIT_TEST_THREADS", "4")
    with settled("cpu", before=1) as choice:
        assert (torch.get_num_threads(), choice) == (4, {})


@pytest.mark.parametrize(("before", "count"), [(1, 1), (2, 2), (64, 4)])
def test_a_run_that_goes_on_has_the_threads_it_began_with_as_far_as_they_are_there(before, count, monkeypatch):
    monkeypatch.setattr(threads, "_time", lambda number, there: pytest.fail("measured"))
    with settled("cpu", before) as choice:
        assert (torch.get_num_threads(), choice) == (count, {})


def test_the_threads_are_back_after_an_error(monkeypatch):
    busy(monkeypatch, {4: 14.0, 2: 9.0, 1: 1.0})
    with pytest.raises(KeyError), settled("cpu"):
        raise KeyError
    assert torch.get_num_threads() == 4


class StopsAtOnce:
    @tk.hookimpl
    def tunekit_saved(self):
        raise KeyboardInterrupt


def test_plan_and_run_say_it_and_a_resume_computes_with_as_many(tiny_directory, tmp_path, monkeypatch):
    busy(monkeypatch, {4: 14.0, 2: 1.0, 1: 1.9})
    pipeline = tk.Pipeline(
        model=str(tiny_directory),
        data=tk.InMemory(rows=ROWS),
        validation=0.0,
        evaluators=(),
        adapter=tk.LoRA(rank=2),
        trainer=tk.SFT(max_steps=2, batch_size=2, save_every=1),
        device="cpu",
    )
    said = "2 of 4, since the machine is busy"
    assert pipeline.plan().choices["threads"].startswith(said)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(tmp_path / "run", observers=[StopsAtOnce()])
    log = tmp_path / "run" / "log.txt"
    assert f" threads: {said}" in log.read_text()
    assert torch.get_num_threads() == 4
    seen = []

    class Looks:
        @tk.hookimpl
        def tunekit_log(self):
            seen.append(torch.get_num_threads())

    threads.fewest_in_the_way.cache_clear()
    busy(monkeypatch, {4: 1.0, 2: 2.0, 1: 4.0})  # by now it is idle
    run = pipeline.run(tmp_path / "run", resume=True, observers=[Looks()])
    assert set(seen) == {2}
    assert run.result["resumes"][0]["libraries"] == []
