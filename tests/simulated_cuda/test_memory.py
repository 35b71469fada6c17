"""What whole pipelines take of a device, and what they do where it has too little."""

import gc
from pathlib import Path
from typing import Any

import pytest

import simulated_cuda
import tunekit as tk

pytestmark = pytest.mark.filterwarnings("ignore")


def test_memory_that_does_not_suffice_halves_the_pass(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunekit.plugins.trainers import loop

    learn, need = loop.learn, []

    def measured(*given: Any, **named: Any) -> Any:
        gc.collect()
        simulated_cuda.reset_peak()
        found = learn(*given, **named)
        need.append(simulated_cuda.counted("peak"))
        return found

    def limited(*given: Any, **named: Any) -> Any:
        gc.collect()
        with simulated_cuda.memory_limit(int(0.97 * max(need[1:]))):  # from the second step on the optimizer has states
            return learn(*given, **named)

    sft = tk.SFT(max_steps=3, batch_size=8, log_every=99, gradient_checkpointing=False, order="as-given")
    monkeypatch.setattr(loop, "learn", measured)
    pipeline(trainer=sft).run(tmp_path / "roomy")
    monkeypatch.setattr(loop, "learn", limited)
    run = pipeline(trainer=sft).run(tmp_path / "tight")
    assert "out of memory" in (run.directory / "log.txt").read_text()


def test_an_export_takes_no_more_than_training_does(pipeline: Any, taken: Any, tmp_path: Path) -> None:
    with taken() as of_training:
        pipeline(trainer=tk.SFT(max_steps=2, batch_size=2, log_every=99)).run(tmp_path / "run")
        training = of_training()
    with taken() as of_export:
        tk.open_run(tmp_path / "run").export(tmp_path / "out")
        assert of_export() <= 1.1 * training


def test_a_run_over_a_quantized_base_takes_no_more_than_one_over_half_precision(pipeline: Any) -> None:
    plain = pipeline(adapter=tk.LoRA(), dtype="bfloat16").plan().memory
    packed = pipeline(adapter=tk.QLoRA(), dtype="bfloat16").plan().memory
    standing = ("frozen weights", "quantization state", "dequantized weights")
    most = sum(plain[part] for part in standing)
    assert 0.8 * most < sum(packed[part] for part in standing) <= 1.02 * most  # the scales of NF4 come on top
