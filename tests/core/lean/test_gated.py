"""A gated MLP over a down-projection of LoRA's keeps fewer activations, and gives the same numbers."""

import pytest
import torch
from torch import nn

import tunekit as tk
from tunekit.core.lean import gated
from tunekit.core.lean.forwards import lean_forwards, usual_forwards
from tunekit.core.lean.gated import LeanGated
from tunekit.core.model.base import Base, load_base
from tunekit.testing import tiny_model

IDS = torch.arange(5, 65).view(2, 30)


def attached(adapter=None, model=None):
    adapter = adapter or tk.LoRA(rank=4, bias="lora_only")
    model = adapter.attach(model or tiny_model(mlp_bias=True), tk.Context(model_id="tiny", total_steps=20))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def gated_in(model):
    return [module for module in model.modules() if isinstance(vars(module).get("forward"), LeanGated)]


def passed(model):
    """Logits and gradients."""
    model.zero_grad()
    torch.manual_seed(0)
    with lean_forwards(model):
        logits = model(input_ids=IDS, use_cache=False).logits
        logits.log_softmax(-1)[..., 7].sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def plain(monkeypatch):
    """Has MLPs compute as they are written, from the call on."""
    return lambda: monkeypatch.setattr(gated, "gated", lambda module: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_is_the_mlp_of_the_model_to_the_last_bit(dtype, dropout, plain):
    model = attached(tk.LoRA(rank=4, bias="lora_only", dropout=dropout)).to(dtype)
    with lean_forwards(model):
        assert len(gated_in(model)) == 2
        with usual_forwards(model):
            assert gated_in(model) == []
        assert len(gated_in(model)) == 2
    assert gated_in(model) == []
    found = passed(model)
    plain()
    expected = passed(model)
    assert len(found) == len(expected) > 20
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("quantizer", [tk.NF4(), tk.Int8()], ids=lambda quantizer: quantizer.name)
def test_over_a_quantized_base_it_is_the_same_mlp(quantizer, tiny_directory, plain):
    base = Base(model=str(tiny_directory))
    context = tk.Context(model_id="tiny", device="cpu", dtype="float32", quantization=quantizer.scheme)
    model = attached(tk.LoRA(rank=4), load_base(base, quantizer, base.codec(), context))
    with lean_forwards(model):
        assert len(gated_in(model)) == model.config.num_hidden_layers
    found = passed(model)
    plain()
    assert all(map(torch.equal, found, passed(model)))


def kept(model):
    """Bytes that autograd keeps of a forward pass, parameters aside."""
    own, seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    with lean_forwards(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=IDS, use_cache=False)
    return sum(storage.nbytes() for storage in seen.values())


def test_neither_silu_nor_the_product_is_kept(plain):
    model = attached()
    less = kept(model)
    plain()
    of_a_tensor = 4 * IDS.numel() * model.config.intermediate_size
    assert kept(model) - less == 2 * of_a_tensor * model.config.num_hidden_layers


class Clamped(nn.Module):
    """Silu, with something more."""

    def forward(self, x):
        return nn.functional.silu(x).clamp(max=1.0)


def test_an_mlp_of_another_kind_is_left_alone():
    def found(model, change=lambda mlp: None):
        for module in model.modules():
            if type(module).__name__ == "LlamaMLP":
                change(module)
        with lean_forwards(model):
            return len(gated_in(model))

    assert found(attached()) == 2
    assert found(attached(), lambda mlp: setattr(mlp, "act_fn", Clamped())) == 0
    assert found(attached(), lambda mlp: setattr(mlp, "norm", nn.Identity())) == 0
    assert found(attached(), lambda mlp: mlp.down_proj.register_forward_hook(lambda *_: None)) == 0
    assert found(attached(tk.LoRA(rank=4, variant="dora"))) == 0
    assert found(attached(tk.LoRA(rank=4, targets="attention"))) == 0
