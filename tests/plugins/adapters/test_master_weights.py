"""Over a base in bfloat16, every method of PEFT's trains float32 weights: steps are too small for half precision."""

import pytest
import torch
from safetensors.torch import load_file

import tunekit as tk
from tunekit.core.registry import default_registry
from tunekit.core.run.checkpoint import trained_parameters
from tunekit.testing import tiny_model
from tunekit.testing.harness import ROWS

REGISTRY = default_registry()
METHODS = {name: REGISTRY.find("adapter", name) for name in REGISTRY.names("adapter") if name != "qlora"}
PEFT = {name: cls for name, cls in METHODS.items() if issubclass(cls, tk.PeftMethod)}
FIELDS = {"peft": {"type": "VERA", "options": {"target_modules": ["q_proj"], "r": 4}}}


def dtypes(model):
    return {str(parameter.dtype) for parameter in trained_parameters(model).values()}


def test_the_methods_are_those_that_there_are():
    assert {"lora", "adalora", "ia3", "loha", "lokr"} <= PEFT.keys()


@pytest.mark.parametrize("name", PEFT)
def test_what_is_trained_is_float32_from_the_start_to_the_file(name, tiny_directory, tmp_path):
    adapter = PEFT[name](**FIELDS.get(name, {}))
    context = tk.Context(model_id="tiny", dtype="bfloat16", total_steps=20)
    attached = adapter.attach(tiny_model().bfloat16(), context)
    assert dtypes(attached) == {"torch.float32"}

    pipeline = tk.Pipeline(
        model=str(tiny_directory),
        data=tk.InMemory(rows=ROWS),
        adapter=adapter,
        trainer=tk.SFT(max_steps=20, batch_size=2, learning_rate=1e-5),
        dtype="bfloat16",
        device="cpu",
    )
    run = pipeline.run(tmp_path / "run")
    model = run._model(tuned=True).model
    assert dtypes(model) == {"torch.float32"}
    assert model.get_base_model().dtype == torch.bfloat16
    stored = [
        tensor
        for path in (run.directory / "adapter").glob("*.safetensors")
        for tensor in load_file(path).values()
        if tensor.is_floating_point()
    ]
    assert {tensor.dtype for tensor in stored} == {torch.float32}
    # A step of 1e-5 moves a float32 weight, and would be lost in a bfloat16 one.
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in stored)


@pytest.mark.parametrize("trained", [("lm_head",), ("embed_tokens",)])
def test_modules_that_lora_trains_whole_are_float32_too(trained, tiny_directory, tmp_path):
    pipeline = tk.Pipeline(
        model=str(tiny_directory),
        data=tk.InMemory(rows=ROWS),
        adapter=tk.LoRA(rank=2, trained_modules=trained),
        trainer=tk.SFT(max_steps=4, batch_size=2, learning_rate=1e-3),
        dtype="bfloat16",
        device="cpu",
    )
    run = pipeline.run(tmp_path / "run")
    live, opened = run._model(tuned=True).model, tk.open_run(run.directory)._model(tuned=True).model
    assert dtypes(live) == {"torch.float32"}
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        assert torch.equal(live(ids).logits, opened(ids).logits)
    name = next(name for name, _ in live.named_parameters() if f"{trained[0]}.modules_to_save" in name)
    kept = live.get_parameter(name)
    assert not torch.equal(kept, kept.bfloat16().float())
    written = load_file(run.export(tmp_path / "merged", dtype="float32") / "model.safetensors")
    assert any(value.shape == kept.shape and torch.equal(value, kept) for value in written.values())
