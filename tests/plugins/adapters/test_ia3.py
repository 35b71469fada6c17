"""IA3 scales the outputs of attention layers and the inputs of feed-forward layers, by hand and by the method."""

import pytest

import tunekit as tk
from tunekit.testing import tiny_model

CONTEXT = tk.Context(model_id="a/b")


def scaled(adapter, architecture="llama"):
    """Which side of each adapted layer is scaled, and by how many factors."""
    model = adapter.attach(tiny_model(architecture), CONTEXT)
    found = {name: module for name, module in model.named_modules() if hasattr(module, "ia3_l")}
    return {
        ".".join(name.split(".")[-2:]): ("input" if layer.is_feedforward else "output", layer.ia3_l["default"].numel())
        for name, layer in found.items()
    }


def test_the_layers_of_the_paper_are_scaled_by_default():
    assert scaled(tk.IA3()) == {
        "self_attn.k_proj": ("output", 16),
        "self_attn.v_proj": ("output", 16),
        "mlp.down_proj": ("input", 64),
    }
    assert scaled(tk.IA3(), "gpt2") == {"attn.c_attn": ("output", 96), "mlp.c_proj": ("input", 128)}


def test_the_output_of_a_layer_is_its_weight_between_the_scales():
    import torch

    base = tiny_model()
    layers = base.model.layers[0]
    key, down = layers.self_attn.k_proj.weight.detach().clone(), layers.mlp.down_proj.weight.detach().clone()
    model = tk.IA3().attach(base, CONTEXT).base_model.model.model.layers[0]
    generator = torch.Generator().manual_seed(0)
    for layer in (model.self_attn.k_proj, model.mlp.down_proj):
        scale = layer.ia3_l["default"]
        scale.data = 1 + torch.randn(scale.shape, generator=generator)
    attended, activated = torch.randn(3, 32, generator=generator), torch.randn(3, 64, generator=generator)
    by_output = model.self_attn.k_proj.ia3_l["default"].flatten() * (attended @ key.T)
    by_input = (activated * model.mlp.down_proj.ia3_l["default"].flatten()) @ down.T
    torch.testing.assert_close(model.self_attn.k_proj(attended), by_output)
    torch.testing.assert_close(model.mlp.down_proj(activated), by_input)


@pytest.mark.parametrize(
    ("adapter", "sides"),
    [
        (tk.IA3(targets=("q_proj", "up_proj")), {"self_attn.q_proj": "output", "mlp.up_proj": "input"}),
        (
            tk.IA3(targets=("q_proj", "up_proj"), feedforward_targets=()),
            {"self_attn.q_proj": "output", "mlp.up_proj": "output"},
        ),
        (tk.IA3(targets="attention"), dict.fromkeys([f"self_attn.{name}_proj" for name in "qkvo"], "output")),
        (
            tk.IA3(targets=r".*(v|down)_proj", feedforward_targets=r".*down_proj"),
            {"self_attn.v_proj": "output", "mlp.down_proj": "input"},
        ),
    ],
    ids=["in the feed-forward block", "none", "attention", "expression"],
)
def test_feedforward_targets_are_scaled_on_their_input(adapter, sides):
    assert {name: side for name, (side, _) in scaled(adapter).items()} == sides


def test_a_feedforward_target_is_a_target():
    with pytest.raises(tk.ConfigError, match=r"IA3\.feedforward_targets: model.layers.0.mlp.up_proj is not among"):
        tk.IA3(targets=("q_proj",), feedforward_targets=("up_proj",)).attach(tiny_model(), CONTEXT)


def test_an_architecture_that_peft_does_not_list_is_to_be_named():
    model = tiny_model()
    model.config.model_type = "novel"
    with pytest.raises(tk.ConfigError, match=r"no layers for the architecture 'novel'.* out of down_proj, gate_proj"):
        tk.IA3().attach(model, CONTEXT)
    assert tk.IA3(targets=("k_proj",)).attach(model, CONTEXT) is not None
