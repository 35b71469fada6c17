"""What is trained whole on CUDA: float32 weights, products in bfloat16, and one pass of the optimizer over all of them."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import simulated_cuda
import tunekit as tk
from simulated_cuda.test_methods import Stop, trained
from tunekit.plugins.trainers import loop

PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.addmm_.default")
"""Of linear layers, forward and backward; attention, here, is computed in float32 by what stands in for its kernel."""
WHOLE = {
    "full": tk.Full(),
    "last layers": tk.LastLayers(),
    "biases": tk.LoRA(rank=2, bias="all"),
    "head": tk.LoRA(rank=2, trained_modules=("norm",)),
}


class Products(TorchDispatchMode):  # type: ignore[misc]
    """Counts products of matrices by their dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function) in PRODUCTS and args[0].is_cuda:
            self.dtypes |= {one.dtype for one in args}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", WHOLE)
def test_all_products_of_its_steps_are_in_bfloat16_and_what_is_trained_in_float32(
    name: str, pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    products, learn = Products(), loop.learn

    def watched(*given: Any, **named: Any) -> Any:
        with products:
            return learn(*given, **named)

    monkeypatch.setattr(loop, "learn", watched)
    run = pipeline(adapter=WHOLE[name], validation=0.2).run(tmp_path / "run")
    assert products.dtypes == {torch.bfloat16}
    model = run._model(tuned=True).model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} <= {torch.bfloat16}
    files = list((run.directory / "adapter").glob("*.safetensors"))
    assert {value.dtype for path in files for value in load_file(path).values()} == {torch.float32}


@pytest.mark.parametrize(("optimizer", "operator"), [("adamw", "_fused_adamw_"), ("sgd", "_fused_sgd_")])
def test_the_optimizer_moves_all_parameters_in_one_pass(
    optimizer: Any, operator: str, pipeline: Any, tmp_path: Path
) -> None:
    sft = tk.SFT(max_steps=3, batch_size=4, optimizer=optimizer)
    with simulated_cuda.counting(launches=True) as counts:
        pipeline(adapter=tk.Full(), trainer=sft).run(tmp_path / "run")
    fused = {name: count for name, count in counts.launches.items() if operator in name}
    assert sum(fused.values()) == 2 * 3, "two groups, with weight decay and without, in each of three steps"
    assert not [name for name in counts.launches if "_foreach_addcdiv" in name or "_foreach_addcmul" in name]


def test_a_resumed_run_is_the_same_to_the_bit(pipeline: Any, tmp_path: Path) -> None:
    sft = tk.SFT(max_steps=4, batch_size=4, save_every=2, log_every=99, background_saving=False)
    whole = pipeline(trainer=sft, adapter=tk.Full()).run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        pipeline(trainer=sft, adapter=tk.Full()).run(tmp_path / "again", observers=[Stop()])
    again = pipeline(trainer=sft, adapter=tk.Full()).run(tmp_path / "again", resume=True)
    one, other = trained(whole), trained(again)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_plan_counts_what_a_step_takes(pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounded copies among it; before the first step the ways to the loss are tried, which is not planned."""
    made = pipeline(adapter=tk.Full(), trainer=tk.SFT(max_steps=3, batch_size=4))
    memory = made.plan().memory
    peaks, learn = [], loop.learn

    def watched(*given: Any, **named: Any) -> Any:
        gc.collect()  # what the trials left, in cycles
        simulated_cuda.reset_peak(0)
        share = learn(*given, **named)
        peaks.append(simulated_cuda.counted("peak", 0))
        return share

    monkeypatch.setattr(loop, "learn", watched)
    run = made.run(tmp_path / "run")
    assert max(peaks) == pytest.approx(sum(memory.values()), rel=0.02)
    assert memory["trained weights"] == sum(value.nbytes for value in trained(run).values())
