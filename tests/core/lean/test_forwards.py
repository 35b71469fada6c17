"""Lean forwards give PEFT's outputs and gradients, for every method over every base, and leave no trace."""

from functools import partial

import pytest
import torch

import tunekit as tk
from tunekit.core.lean import forwards, norm
from tunekit.core.lean.forward import LeanForward
from tunekit.core.lean.forwards import drop_kept, lean_forwards, usual_forwards
from tunekit.core.model.base import Base, load_base
from tunekit.plugins.trainers.micro_batches import Limits, learn
from tunekit.testing import tiny_model

METHODS = {
    "lora": tk.LoRA(rank=4),
    "lora, trained bias": tk.LoRA(rank=4, bias="lora_only"),
    "lora, dropout": tk.LoRA(rank=4, dropout=0.3),
    "rslora": tk.LoRA(rank=4, variant="rslora"),
    "dora": tk.LoRA(rank=4, variant="dora"),
    "dora, dropout": tk.LoRA(rank=4, variant="dora", dropout=0.3),
    "pissa": tk.LoRA(rank=4, variant="pissa"),
    "adalora": tk.AdaLoRA(initial_rank=4, target_rank=2),
    "adalora, dropout": tk.AdaLoRA(initial_rank=4, target_rank=2, dropout=0.3),
    "ia3": tk.IA3(targets="all-linear"),
    "loha by rank": tk.LoHa(rank=2, alpha=4),
    "loha by rank, dropout": tk.LoHa(rank=2, alpha=4, dropout=0.3),
    "loha by weight": tk.LoHa(rank=8),
    "loha by weight, dropout": tk.LoHa(rank=8, dropout=0.3),
    "lokr": tk.LoKr(rank=2, alpha=4),
    "lokr, dropout": tk.LoKr(rank=2, alpha=4, dropout=0.3),
    "lokr, factor": tk.LoKr(rank=3, factor=2),
    "lokr, full": tk.LoKr(rank=16, alpha=8),
    "lokr, full, dropout": tk.LoKr(rank=16, dropout=0.3),
}
WITHOUT_DROPOUT = {name: adapter for name, adapter in METHODS.items() if "dropout" not in name and name != "pissa"}
BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.fixture(autouse=True)
def of_adapters_alone(monkeypatch):
    """Normalizations compute as they do: they have tests of their own."""
    monkeypatch.setattr(norm, "norm", lambda module: None)


def attached(adapter, model=None, dtype="float32"):
    """`model` with the method attached, every trained number moved away from where it starts."""
    model = tiny_model() if model is None else model
    wrapped = adapter.attach(model, tk.Context(model_id="tiny", dtype=dtype, total_steps=20)).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return wrapped


def passed(model):
    """Logits and all gradients of a forward and a backward pass, the same random numbers drawn each time."""
    ids = torch.arange(5, 65).view(2, 30)
    model.zero_grad()
    torch.manual_seed(2)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    logits.log_softmax(-1)[..., 7].sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    return {"logits": logits.detach(), **gradients}, torch.rand(1)


def apart(found, expected):
    """The relative distance of the logits, that of all gradients together, and the largest of one tensor's."""
    assert found.keys() == expected.keys()
    alone = {name: ((found[name] - value).norm() / value.norm()).item() for name, value in expected.items()}
    before, after = (
        torch.cat([value.flatten() for name, value in table.items() if name != "logits"]) for table in (expected, found)
    )
    return alone["logits"], ((after - before).norm() / before.norm()).item(), max(alone.values())


def compare(model, replaced=14):
    expected, drawn = passed(model)
    with lean_forwards(model) as lean:
        assert len(lean) == replaced
        found, drawn_too = passed(model)
    assert torch.equal(drawn, drawn_too)
    return apart(found, expected)


@pytest.mark.parametrize("adapter", METHODS.values(), ids=METHODS)
def test_outputs_and_gradients_are_those_of_pefts_forward(adapter):
    logits, gradients, _ = compare(attached(adapter, tiny_model(**BIASES)))
    assert max(logits, gradients) < 1e-6
    # What is left is rounding: in float64 it is as little for each tensor alone, small ones and sums near zero too.
    *_, of_any = compare(attached(adapter, tiny_model(**BIASES)).double())
    assert of_any < 1e-6


def test_the_transposed_layers_of_gpt2():
    for adapter in (tk.LoRA(rank=4), tk.LoRA(rank=4, variant="dora"), tk.IA3(targets="all-linear")):
        assert max(compare(attached(adapter, tiny_model("gpt2")), replaced=8)[:2]) < 1e-6


@pytest.mark.parametrize("adapter", METHODS.values(), ids=METHODS)
def test_over_a_base_in_bfloat16_within_its_rounding(adapter):
    """The adapter's float32 weights are multiplied in bfloat16, whose step is 2**-8, by fewer roundings than PEFT's."""
    model = attached(adapter, tiny_model(**BIASES).bfloat16(), "bfloat16")
    logits, gradients, _ = compare(model)
    assert logits < 2e-2
    assert gradients < 5e-2
    # Added to W in bfloat16, an update would be rounded away: there, LoHa that is not of low rank has PEFT's forward.
    assert (logits == gradients == 0) is (isinstance(adapter, tk.LoHa) and adapter.rank == 8)


@pytest.mark.parametrize("adapter", WITHOUT_DROPOUT.values(), ids=WITHOUT_DROPOUT)
@pytest.mark.parametrize("quantizer", [tk.NF4(), tk.Int8()], ids=lambda quantizer: quantizer.name)
def test_over_a_quantized_base(adapter, quantizer, tiny_directory):
    pytest.importorskip("bitsandbytes")
    logits, gradients, _ = compare(attached(adapter, load(tiny_directory, quantizer)))
    assert max(logits, gradients) < 1e-6


def load(directory, quantizer, dtype="float32"):
    context = tk.Context(model_id="tiny", device="cpu", dtype=dtype, quantization=quantizer.scheme)
    base = Base(model=str(directory))
    return load_base(base, quantizer, base.codec(), context)


def lean_in(model):
    return [module for module in model.modules() if isinstance(vars(module).get("forward"), LeanForward)]


def test_afterwards_and_in_between_the_layers_have_their_own_forwards():
    model = attached(tk.LoRA(rank=4))
    names, size = list(model.state_dict()), sum(p.numel() for p in model.parameters())
    with lean_forwards(model):
        assert len(lean_in(model)) == 14
        assert (list(model.state_dict()), sum(p.numel() for p in model.parameters())) == (names, size)
        with usual_forwards(model):
            assert lean_in(model) == []
        assert len(lean_in(model)) == 14
    assert lean_in(model) == []


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_dequantized_weights_are_kept_while_memory_lasts_and_are_the_same_kept_or_not(
    share, tiny_directory, monkeypatch
):
    pytest.importorskip("bitsandbytes")
    model = attached(tk.QLoRA(rank=4), load(tiny_directory, tk.NF4()))
    layers = [module for module in model.modules() if tk.NF4().is_quantized(module)]
    room = int(share * sum(4 * layer.in_features * layer.out_features for layer in layers))
    monkeypatch.setattr(forwards, "free_bytes", lambda device: 2 * room)
    with lean_forwards(model) as lean:
        first, _ = passed(model)
        again, _ = passed(model)
        kept = [one.base for one in lean if one.base._kept is not None]
        assert room - 8192 < sum(4 * base._kept.numel() for base in kept) <= room, "but for one more of the largest"
        assert all(torch.equal(base._kept, tk.NF4().dequantize(base.module)) for base in kept)
    monkeypatch.setattr(forwards, "free_bytes", lambda device: 0)
    with lean_forwards(model):
        bare, _ = passed(model)
    assert all(torch.equal(first[name], value) and torch.equal(again[name], value) for name, value in bare.items())


def test_where_memory_runs_out_they_are_dropped_before_anything_else_is_changed(tiny_directory):
    pytest.importorskip("bitsandbytes")
    model, given = attached(tk.QLoRA(rank=4), load(tiny_directory, tk.NF4())), []
    train = {0: {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}}

    def loss(places):
        given.append(sum(one.base._kept is not None for one in lean))
        if given[-1]:
            raise MemoryError
        ids = torch.tensor([train[at]["input_ids"] for at in places])
        return model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum()

    with lean_forwards(model) as lean:
        passed(model)
        clear = partial(drop_kept, model)
        share = learn(1, [0], train, Limits(), padded=True, loss=loss, backward=torch.Tensor.backward, clear=clear)
        assert not drop_kept(model)
    assert given == [14, 0]
    assert share.limits == Limits()
    assert share.notes == ["step 1: out of memory; dequantized weights are not kept from here on (MemoryError: )"]


def spoilt(change):
    """Layers of a LoRA model of which `change` makes two something else."""
    model = attached(tk.LoRA(rank=4, dropout=0.2), tiny_model(**BIASES))
    for name in ("q_proj", "up_proj"):
        change(
            model.base_model.model.model.layers[0].get_submodule({"q_proj": "self_attn"}.get(name, "mlp") + "." + name)
        )
    return model


def other_forward(layer):
    layer.forward = layer.forward


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.lora_dropout.update({"default": torch.nn.AlphaDropout(0.2)}),
        lambda layer: layer.lora_bias.update({"default": True}),
        lambda layer: layer.lora_variant.update({"default": object()}),
        lambda layer: layer.base_layer.register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda layer: layer.base_layer.weight.requires_grad_(True),
        lambda layer: setattr(layer, "__class__", type("Other", (type(layer),), {})),
        lambda layer: setattr(layer, "_active_adapter", ["default", "other"]),
        other_forward,
    ],
    ids=["dropout", "bias", "variant", "hook", "trained", "subclass", "adapters", "forward"],
)
def test_a_layer_that_does_something_else_keeps_its_own_forward(change):
    with lean_forwards(spoilt(change)) as lean:
        assert len(lean) == 12


def test_what_is_only_seen_when_it_is_called_goes_by_pefts_forward_too():
    model, ids = attached(tk.LoRA(rank=4)), torch.arange(5, 25)[None]
    with torch.no_grad(), lean_forwards(model):
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, tiny_model()(ids).logits)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(ids).logits
        with usual_forwards(model), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(found, model(ids).logits)
