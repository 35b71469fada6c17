"""Which device a run takes, and that it takes nothing of another."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tunekit as tk
from simulated_cuda.methods import METHODS
from tunekit.core.run.run_log import RunLog

pytestmark = pytest.mark.filterwarnings("ignore")

STARTED_AND_RESUMED = """
import sys
import simulated_cuda
simulated_cuda.install()
import tunekit as tk
from tunekit.core.hookspecs import hookimpl

class Stop:
    @hookimpl
    def tunekit_saved(self, run, step, directory):
        raise KeyboardInterrupt

directory, what = sys.argv[1:]
rows = [{"text": f"to be or not to be {n}"} for n in range(12)]
sft = tk.SFT(max_steps=4, batch_size=4, save_every=2, background_saving=False)
pipeline = tk.Pipeline(model=tk.TINY, data=tk.InMemory(rows=rows), validation=0, trainer=sft)
try:
    pipeline.run(directory, resume=what == "resume", observers=[] if what == "resume" else [Stop()])
except KeyboardInterrupt:
    pass
"""


def test_a_run_is_resumed_where_fewer_gpus_are_seen(tmp_path: Path) -> None:
    for what, gpus in (("start", "2"), ("resume", "1")):
        done = subprocess.run(
            [sys.executable, "-c", STARTED_AND_RESUMED, str(tmp_path / "run"), what],
            env={**os.environ, "SIMULATED_CUDA": gpus, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-1500:]
    assert tk.open_run(tmp_path / "run").history


def test_the_cpu_can_be_asked_for_after_cuda_in_one_process_and_the_other_way_round(
    pipeline: Any, tmp_path: Path
) -> None:
    for at, device in enumerate(["cuda", "cpu", "cuda"]):
        pipeline(device).run(tmp_path / str(at))


@pytest.mark.parametrize("name", ["lora", "qlora", "full"])
def test_a_run_on_the_second_gpu_takes_nothing_of_the_first(
    name: str, second_gpu: str, pipeline: Any, taken: Any, tmp_path: Path
) -> None:
    with taken(device=0) as of_the_first:
        pipeline(second_gpu, validation=0.2, **METHODS[name]()).run(tmp_path / "run")
        tk.open_run(tmp_path / "run").export(tmp_path / "out")
        assert of_the_first() == 0


def test_a_run_on_the_cpu_takes_nothing_of_a_gpu(pipeline: Any, taken: Any, tmp_path: Path) -> None:
    with taken() as of_the_gpu:
        pipeline("cpu", validation=0.2).run(tmp_path / "run")
        tk.open_run(tmp_path / "run").export(tmp_path / "out")
        assert of_the_gpu() == 0


def test_dropout_on_the_second_gpu_follows_the_seed(
    second_gpu: str, pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, draw = [], RunLog.draw

    def drawn(self: RunLog, seed: int) -> None:
        draw(self, seed)
        states.append(torch.cuda.get_rng_state(second_gpu))

    monkeypatch.setattr(RunLog, "draw", drawn)
    for seed in (0, 1):
        pipeline(second_gpu, adapter=tk.LoRA(dropout=0.2), seed=seed).run(tmp_path / str(seed))
    assert not torch.equal(*states)


def test_the_trainer_of_transformers_trains_on_the_gpu_that_was_asked_for_and_takes_nothing_of_the_first(
    second_gpu: str, pipeline: Any, taken: Any, tmp_path: Path
) -> None:
    trainer = tk.Transformers(arguments={"max_steps": 2, "per_device_train_batch_size": 4})
    with taken(device=0) as of_the_first:
        run = pipeline(second_gpu, trainer=trainer).run(tmp_path / "run")
        assert of_the_first() == 0
    assert torch.cuda.current_device() == 0
    assert len(run.history) == 2


def test_the_trainer_of_transformers_uses_the_one_gpu_that_was_asked_for(second_gpu: str, tmp_path: Path) -> None:
    trainer = tk.Transformers(arguments={"max_steps": 2, "per_device_train_batch_size": 2})
    assert trainer._arguments(str(tmp_path), tk.Context(model_id="x", device="cuda")).n_gpu == 1
    there = trainer._arguments(str(tmp_path), tk.Context(model_id="x", device=second_gpu))
    assert (there.n_gpu, there.device) == (1, torch.device(second_gpu))


def test_of_random_states_those_of_the_named_gpu_are_kept_and_put_into_the_named_one(second_gpu: str) -> None:
    from tunekit.core.common.random_states import random_states, set_random_states

    torch.cuda.manual_seed_all(7)
    torch.rand(3, device=second_gpu)
    kept = random_states(second_gpu)
    expected = torch.rand(3, device=second_gpu).cpu()
    set_random_states(kept, "cuda:0")
    assert torch.equal(torch.rand(3, device="cuda:0").cpu(), expected)
    assert len(random_states()["cuda"]) == torch.cuda.device_count()
    set_random_states(random_states("cpu"), "cuda:0")  # a run that was begun on the CPU has none for a GPU


def test_progress_shows_the_peak_of_the_gpu_of_the_run(second_gpu: str) -> None:
    from tunekit.plugins.observers.progress import _memory

    there = torch.ones(1024, device=second_gpu)
    assert _memory(second_gpu) == torch.cuda.max_memory_allocated(second_gpu) >= there.nbytes
    assert _memory("cpu") > 2**20  # of the process
