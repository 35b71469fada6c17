"""PiSSA starts as the base, from its largest singular values, and is saved as LoRA for the base as it was."""

import json

import pytest

import tunekit as tk
from tunekit.testing import tiny_model
from tunekit.testing.harness import Harness
from tunekit.testing.training import distance, logits, train

CONTEXT = tk.Context(model_id="a/b", total_steps=20)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_plain_peft_loads_pissa_onto_the_original_base(architecture, tmp_path):
    from peft import PeftModel

    harness = Harness(architecture=architecture)
    adapter = tk.LoRA(rank=4, alpha=6, variant="pissa")
    model = adapter.attach(harness.model(), CONTEXT)
    train(adapter, model, harness.batch(), 3)
    live = logits(model, harness.batch())
    adapter.save(model, tmp_path)

    theirs = PeftModel.from_pretrained(harness.model(), tmp_path)
    assert distance(logits(theirs, harness.batch()), live) < 1e-5
    assert distance(logits(adapter.load(harness.model(), tmp_path), harness.batch()), live) < 1e-5
    assert distance(logits(harness.model(), harness.batch()), live) > 1e-2
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 8

    again = tmp_path / "again"
    again.mkdir()
    adapter.save(adapter.load(harness.model(), tmp_path), again)
    reloaded = adapter.load(harness.model(), again)
    assert distance(logits(reloaded, harness.batch()), live) < 1e-5


def test_pissa_keeps_what_the_largest_singular_values_leave_over():
    import torch

    base = tiny_model()
    original = base.model.layers[0].mlp.up_proj.weight.detach().clone()
    model = tk.LoRA(rank=4, variant="pissa").attach(base, CONTEXT)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    residual = torch.linalg.svdvals(layer.base_layer.weight.detach())
    expected = torch.linalg.svdvals(original)[4:]
    torch.testing.assert_close(residual[: len(expected)], expected, atol=1e-5, rtol=1e-4)


def test_a_rank_above_that_of_a_weight_is_refused_by_pissa():
    with pytest.raises(tk.ConfigError, match=r"LoRA\.rank: .*k_proj has only 16 singular values"):
        tk.LoRA(rank=20, variant="pissa").attach(tiny_model(), CONTEXT)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj",), r".*\.mlp\..*"])
def test_only_the_named_layers_are_adapted(targets):
    model = tk.LoRA(rank=2, targets=targets, layers=(1,)).attach(tiny_model(), CONTEXT)
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert adapted
    assert all(".layers.1." in name for name in adapted)
