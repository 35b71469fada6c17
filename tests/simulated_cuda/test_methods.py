"""Whole pipelines of every method, as if on CUDA: to their end, with one wait a step, and the same when resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import simulated_cuda
import tunekit as tk
from simulated_cuda.methods import CANNOT_BE_MERGED, METHODS
from tunekit.core.hookspecs import hookimpl

pytestmark = pytest.mark.filterwarnings("ignore")


class Stop:
    """Ends a run when its first checkpoint is there."""

    @hookimpl
    def tunekit_saved(self, run: Any, step: int, directory: Path) -> None:
        raise KeyboardInterrupt


def trained(run: tk.Run) -> dict[str, torch.Tensor]:
    return load_file(next((run.directory / "adapter").glob("*.safetensors")))


@pytest.mark.parametrize("name", METHODS)
def test_a_run_trains_evaluates_saves_is_opened_again_and_exported(name: str, pipeline: Any, tmp_path: Path) -> None:
    pipeline(validation=0.2, **METHODS[name]()).run(tmp_path / "run")
    run = tk.open_run(tmp_path / "run")
    assert isinstance(run.generate([{"role": "user", "content": "What is 3 and 3?"}], max_new_tokens=4), str)
    if name not in CANNOT_BE_MERGED:
        run.export(tmp_path / "plain")
        assert (tmp_path / "plain" / "model.safetensors").is_file()


def waits_of_a_step(made: tk.Pipeline, directory: Path, monkeypatch: pytest.MonkeyPatch, step: int = 3) -> Any:
    from tunekit.plugins.trainers import loop

    seen, learn = [], loop.learn

    def watched(*given: Any, **named: Any) -> Any:
        seen.append(counts.waits.copy())
        return learn(*given, **named)

    monkeypatch.setattr(loop, "learn", watched)
    with simulated_cuda.counting() as counts:
        made.run(directory)
    return seen[step + 1] - seen[step]


def in_words(waits: Any) -> str:
    return "\n".join(f"{n} x {what} at {place}" for (what, place), n in waits.items())


STEPS = {"max_steps": 6, "batch_size": 4, "save_every": 99, "log_every": 99}


# bitsandbytes waits in every layer of Int8.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "int8"])
def test_a_step_waits_once(name: str, pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pipeline(trainer=tk.SFT(**STEPS), **METHODS[name]())
    waits = waits_of_a_step(made, tmp_path / "run", monkeypatch)
    assert waits.total() == 1, in_words(waits)


@pytest.mark.parametrize(
    "changes",
    [
        {"padding_free": False},
        {"padding_free": False, "chunked_loss": False, "lean": False},
        {"padding_free": False, "micro_batch_size": 1},
    ],
    ids=str,
)
def test_a_step_of_padded_rows_waits_once(
    changes: Any, pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = waits_of_a_step(pipeline(trainer=tk.SFT(**STEPS, **changes)), tmp_path / "run", monkeypatch)
    assert waits.total() == 1, in_words(waits)


@pytest.mark.parametrize(("steps", "epoch"), [(6, "first"), (12, "later")])
def test_hidden_states_that_are_kept_come_and_go_together(
    steps: int, epoch: str, pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft = tk.SFT(**STEPS | {"max_steps": steps}, cache_frozen_layers=True)  # twenty rows are five steps
    waits = waits_of_a_step(pipeline(trainer=sft, adapter=tk.LastLayers()), tmp_path / "run", monkeypatch, steps - 3)
    assert waits.total() == (2 if epoch == "first" else 1), in_words(waits)


@pytest.mark.parametrize("name", ["dropout", "qlora", "adalora"])
def test_a_resumed_run_is_the_same_to_the_bit(name: str, pipeline: Any, tmp_path: Path) -> None:
    sft = tk.SFT(max_steps=4, batch_size=4, save_every=2, log_every=99, learning_rate=1e-2, background_saving=False)
    whole = pipeline(trainer=sft, **METHODS[name]()).run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        pipeline(trainer=sft, **METHODS[name]()).run(tmp_path / "again", observers=[Stop()])
    again = pipeline(trainer=sft, **METHODS[name]()).run(tmp_path / "again", resume=True)
    one, other = trained(whole), trained(again)
    assert all(torch.equal(one[key], other[key]) for key in one)
