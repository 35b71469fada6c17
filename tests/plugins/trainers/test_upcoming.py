"""Rows made ready beside the training of the step before: the same steps, and no error lost."""

import threading

import pytest
import torch

from tests.plugins.trainers.test_sft import encoded, fit, largest_difference
from tunekit import SFT
from tunekit.core.training.parallel import Processes
from tunekit.core.training.rows_loss import RowsLoss
from tunekit.plugins.trainers.micro_batches import Limits
from tunekit.plugins.trainers.upcoming import StepRows, upcoming
from tunekit.testing import tiny_model

WAIT = 20
"""Seconds after which a test gives up on a thread."""


@pytest.mark.parametrize("micro_batch_size", ["auto", 2])
@pytest.mark.parametrize("padding_free", [True, False])
def test_every_step_is_the_same_to_the_bit_without(tmp_path, micro_batch_size, padding_free):
    options = {"epochs": 2, "batch_size": 3, "micro_batch_size": micro_batch_size, "padding_free": padding_free}
    ahead, _, lines = fit(SFT(**options), tmp_path / "ahead")
    plain, _, expected = fit(SFT(**options, prefetch=False), tmp_path / "plain")
    assert largest_difference(ahead, plain) == 0
    assert largest_difference(ahead, tiny_model()) > 0
    kept = ("step", "loss", "grad_norm", "tokens")
    assert [[line[name] for name in kept] for line in lines] == [[line[name] for name in kept] for line in expected]


def test_the_next_is_made_while_this_one_is_at_work():
    made, threads = {2: threading.Event()}, {}

    def make(step):
        threads[step] = threading.current_thread()
        if step in made:
            made[step].set()
        return step

    coming = upcoming(make, range(1, 4), "cpu", beside=True)
    assert next(coming) == 1
    assert made[2].wait(WAIT)
    assert list(coming) == [2, 3]
    assert threading.current_thread() not in threads.values()


def test_without_it_each_is_made_when_its_turn_comes():
    made = []
    coming = upcoming(lambda step: made.append(step) or step, range(5, 8), "cpu", beside=False)
    assert next(coming) == 5
    assert made == [5]


@pytest.mark.parametrize("beside", [True, False])
def test_no_steps_are_no_steps(beside):
    assert list(upcoming(pytest.fail, range(3, 3), "cpu", beside=beside)) == []


def test_a_row_that_cannot_be_read_is_an_error_at_its_step_and_no_thread_stays(tmp_path, monkeypatch):
    """The rows of the second step, which are read while the first one computes."""
    steps = []

    def unreadable(rows, *rest):
        if len(steps) == 1:
            raise OSError("the file is gone")
        steps.append(rows)
        return made(rows, *rest)

    made = StepRows.of
    monkeypatch.setattr(StepRows, "of", unreadable)
    learned = []
    with pytest.raises(OSError, match="the file is gone"):
        fit(SFT(max_steps=4, batch_size=3), tmp_path / "run", after_step=lambda model, step: learned.append(step))
    assert learned == [1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("upcoming")]


def test_a_run_that_stops_by_an_error_waits_for_its_thread(tmp_path):
    def broken(model, step):
        raise KeyError("of a plugin")

    with pytest.raises(KeyError, match="of a plugin"):
        fit(SFT(max_steps=4, batch_size=3), tmp_path / "run", after_step=broken)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("upcoming")]


def test_what_does_not_fit_beside_is_made_in_its_turn_where_memory_is_made(tmp_path, monkeypatch):
    """A batch for which there is no memory while another step computes: all goes on as if it had not been tried."""
    expected, _, _ = fit(SFT(epochs=1, batch_size=3), tmp_path / "plain")
    true, refused = RowsLoss.batch, []

    def batch(self, rows):
        if threading.current_thread() is not threading.main_thread():
            refused.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true(self, rows)

    monkeypatch.setattr(RowsLoss, "batch", batch)
    found, result, _ = fit(SFT(epochs=1, batch_size=3), tmp_path / "refused")
    assert len(refused) == 3
    assert "out_of_memory" not in result.metrics
    assert largest_difference(found, expected) == 0


def test_where_other_rows_go_through_the_model_than_were_expected_they_are_laid_out_then():
    """As after a step that ran out of memory."""
    rows, model = encoded(4), tiny_model()
    way = RowsLoss(model=model, pad_id=0, device="cpu", padding_free=True, chunked=True)
    given = StepRows.of([3, 1], rows, Limits(), Processes(), way)
    assert list(given.batches) == [(3, 1)]
    with way.training():
        whole = given.loss(model, [3, 1])
        parts = given.loss(model, [1]) + given.loss(model, [3])
        alone = way(model, [rows[1]]) / given.tokens
        assert given.loss(model, [1]) == alone
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)


def test_the_thread_uses_the_gpu_of_the_one_that_trains(monkeypatch):
    """On several GPUs, the one of the process: of a thread that says nothing it is the first."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: chosen.append((number, threading.current_thread())))
    assert list(upcoming(lambda step: step, range(1, 3), "cuda", beside=True)) == [1, 2]
    [(number, thread)] = chosen
    assert number == 3
    assert thread is not threading.current_thread()
