"""Where memory runs out, a step begins again with half as much at once, and is the same step."""

import pickle
import warnings
from itertools import pairwise

import attrs
import pytest
import torch
from test_sft import CONTEXT, encoded, fit, largest_difference

from tunekit import SFT, TrainingError
from tunekit.core.run.checkpoint import newest
from tunekit.core.training.parallel import Processes
from tunekit.plugins.trainers.micro_batches import Limits, Share, exchanged, is_out_of_memory, learn, read, smallest
from tunekit.testing import tiny_model

ROWS = 7
LONGEST = max(len(row["input_ids"]) for row in encoded(ROWS))
KINDS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


def limited(tokens, error=KINDS[0], late=False):
    """A tiny model that has memory for so many tokens in training; `late` is when the gradients are made."""
    model = tiny_model()
    most = []

    def before(module, arguments, named):
        if module.training:
            most.append(named["input_ids"].numel())
            if not late and most[-1] > tokens:
                raise error

    def after(module, arguments, named, output):
        if module.training and late and most[-1] > tokens:
            output.logits.register_hook(fail)

    def fail(gradient):
        raise error

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True)
    return model, most


def trainer(**changes):
    return SFT(**{"max_steps": 4, "batch_size": 4, "learning_rate": 0.01, "optimizer": "sgd", **changes})


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("micro", [4, "auto"])
@pytest.mark.parametrize("padding_free", [True, False])
def test_the_steps_are_those_of_small_forward_passes_from_the_start(padding_free, micro, late, tmp_path):
    small, _, expected = fit(trainer(micro_batch_size=1, padding_free=padding_free), tmp_path / "small", rows=ROWS)
    tight, most = limited(LONGEST, late=late)
    way = trainer(micro_batch_size=micro, padding_free=padding_free)
    _, result, lines = fit(way, tmp_path / "tight", rows=ROWS, model=tight)
    assert max(most) > LONGEST  # it was tried
    assert largest_difference(small, tight) < 1e-6
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert result.metrics["out_of_memory"] > 0
    notes = (tmp_path / "tight" / "log.txt").read_text()
    assert notes.count("out of memory with") == result.metrics["out_of_memory"]


@pytest.mark.parametrize("error", KINDS)
def test_every_allocator_is_understood(error, tmp_path):
    assert is_out_of_memory(error)
    model, _ = limited(LONGEST, error)
    assert fit(trainer(), tmp_path / "run", rows=ROWS, model=model)[1].metrics["out_of_memory"]


def test_what_else_goes_wrong_is_raised_as_it_is(tmp_path):
    model, most = limited(LONGEST, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        fit(trainer(), tmp_path / "run", rows=ROWS, model=model)
    assert len([tokens for tokens in most if tokens > LONGEST]) == 1


def test_a_row_that_does_not_fit_alone_is_named_with_its_length(tmp_path):
    model, _ = limited(LONGEST - 1)
    with pytest.raises(TrainingError, match=f"encoded training row 7 alone, which has {LONGEST} tokens.*max_length"):
        fit(trainer(batch_size=ROWS), tmp_path / "run", rows=ROWS, model=model)


def test_the_second_attempt_draws_the_random_numbers_of_the_first(tmp_path):
    """With dropout in the model, it is the run that had the smaller passes from the start, if the first step fails."""

    def dropping(model):
        def drop(module, arguments, output):
            return torch.nn.functional.dropout(output, 0.5, training=module.training)

        model.model.embed_tokens.register_forward_hook(drop)
        return model

    # The plainest way: no other is tried, so that the first pass in training mode is the first step's.
    plainly = {"padding_free": False, "chunked_loss": False, "lean": False}
    small = dropping(tiny_model())
    fit(trainer(micro_batch_size=2, **plainly), tmp_path / "small", model=small, rows=4)
    tight, _ = limited(10**9)
    calls = []

    def once(module, arguments, named):
        if module.training and not calls:
            calls.append(1)
            torch.rand(5)  # what the first attempt had drawn
            raise KINDS[0]

    tight.register_forward_pre_hook(once, with_kwargs=True)
    fit(trainer(micro_batch_size=4, **plainly), tmp_path / "tight", model=dropping(tight), rows=4)
    assert calls
    assert largest_difference(small, tight) == 0


def test_what_was_found_to_fit_is_kept_in_checkpoints(tmp_path):
    way = trainer(max_steps=6, save_every=3, keep=9)
    whole, _ = limited(LONGEST)
    fit(way, tmp_path / "whole", rows=ROWS, model=whole)
    kept = newest(tmp_path / "whole" / "checkpoints")
    assert kept.state["trainer"]["so_far"]["limits"]["halved"] > 0
    again, most = limited(LONGEST)
    fit(way, tmp_path / "whole", rows=ROWS, model=again, resumed=kept)
    assert max(most) <= LONGEST
    assert largest_difference(whole, again) == 0


def test_processes_agree_on_the_smallest_limits():
    found = smallest([Limits(rows=4), Limits(rows=2, halved=1), Limits(rows=3)])
    assert attrs.asdict(found) == {"tokens": 2**62, "rows": 2, "halved": 1}
    assert smallest([Limits(tokens=9), Limits(tokens=4, halved=2)]) == Limits(tokens=4, halved=2)


def scalar(rows, weight):
    """A loss of which the gradient is the number of tokens."""
    return weight * float(sum(len(row["input_ids"]) for row in rows))


def test_with_a_model_in_pieces_a_process_with_fewer_rows_makes_as_many_passes_with_no_weight():
    train = dict(enumerate(encoded(3)))
    shortest = min(len(row["input_ids"]) for row in train.values())
    weight = torch.ones((), requires_grad=True)
    asked, passes = [], []

    def loss(places):
        rows = [train[at] for at in places]
        passes.append(len(rows[0]["input_ids"]))
        return scalar(rows, weight)

    def most(count):
        assert not passes  # before the first: in it, the process would meet others that go through the model
        asked.append(count)
        return 3

    options = {
        "padded": True,
        "loss": loss,
        "backward": lambda part: part.backward(),
        "clear": list,
        "most": most,
    }
    share = learn(1, [2], train, Limits(rows=1), **options)
    assert asked == [1]
    assert passes == [len(train[2]["input_ids"]), shortest, shortest]
    assert weight.grad == passes[0]
    assert share.rows == [[2]]
    passes.clear()
    assert learn(2, [], train, Limits(rows=1), **options).losses == []
    assert len(passes) == 3


def test_with_a_model_in_pieces_the_step_is_not_begun_again():
    passes = []

    def loss(places):
        passes.append(places)
        raise KINDS[0]

    options = {"padded": True, "loss": loss, "backward": list, "clear": list, "most": lambda count: count}
    with pytest.raises(TrainingError, match=r"pieces.*micro_batch_size"):
        learn(1, [0, 1], dict(enumerate(encoded(2))), Limits(rows=2), **options)
    assert len(passes) == 1


# Waiting for a GPU ---------------------------------------------------------------------------------------------------


def test_no_loss_is_read_before_all_forward_passes_are_under_way():
    """A tensor on the meta device cannot be read at all."""
    rows = dict(enumerate(encoded(3)))
    share = learn(
        1,
        list(rows),
        rows,
        Limits(rows=1),
        padded=False,
        loss=lambda given: torch.zeros((), device="meta"),
        backward=lambda loss: None,
        clear=lambda: None,
    )
    assert len(share.losses) == 3


def test_all_losses_and_the_norm_are_read_at_once(monkeypatch):
    reads = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or plain(self))
    first = Share(rows=[[0, 2], [1]], losses=[torch.tensor(0.1), torch.tensor(float("nan"))], limits=Limits(), notes=[])
    other = Share(rows=[[3]], losses=[torch.tensor(0.25, dtype=torch.float64)], limits=Limits(), notes=[])
    found, norm = read([first, other], torch.tensor(3.0, dtype=torch.bfloat16))
    assert reads == [(4,)]
    assert found[0] == (torch.tensor(0.1).item(), [0, 2])
    assert found[1][1:] == ([1],)
    assert found[1][0] != found[1][0]
    assert (found[2:], norm) == ([(0.25, [3])], 3.0)


@pytest.mark.parametrize("alone", [False, True])
def test_processes_tell_each_other_their_rows_and_exchange_losses_that_nobody_reads(alone, monkeypatch):
    told = []
    meta = [torch.zeros((), device="meta") for _ in range(3)]  # a tensor without a value cannot be read

    class Two(Processes):
        def gather(self, value):
            told.append(value)
            other = Share(rows=[[7]], losses=[], limits=Limits(rows=1), notes=["n"])
            return [value, other if alone else (other, None)]

        def gather_numbers(self, numbers, counts, device):
            assert (counts, device) == ([2, 1], "there")
            return [*numbers, meta[2]]

    def attempt():
        return Share(rows=[[0], [1, 2]], losses=meta[:2], limits=Limits(), notes=[])

    own, other = exchanged(Two(rank=0, count=2), attempt, "there", alone=alone)
    assert (own.rows, own.losses) == ([[0], [1, 2]], meta[:2])
    assert (other.rows, other.losses, other.notes) == ([[7]], meta[2:], ["n"])
    assert "torch" not in str(pickle.dumps(told)), "no tensor goes with the message"


@pytest.mark.gpu
@pytest.mark.parametrize("padding_free", [True, False])
def test_a_step_waits_once_for_a_gpu(padding_free, tmp_path):
    once = {"log_every": 6, "save_every": 99}  # a checkpoint is copied from the GPU, which waits
    trainer = SFT(max_steps=6, micro_batch_size=2, batch_size=4, padding_free=padding_free, **once)
    counts = []

    def after_step(model, step):
        counts.append(len([each for each in caught if "synchronizing" in str(each.message)]))
        torch.cuda.set_sync_debug_mode("warn")

    # Every time, where pytest's own record shows a warning of one line once.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            context = attrs.evolve(CONTEXT, device="cuda")
            fit(trainer, tmp_path / "run", model=tiny_model().cuda(), after_step=after_step, context=context)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [more - before for before, more in pairwise(counts[1:])] == [1] * 4
