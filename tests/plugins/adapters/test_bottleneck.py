"""Bottleneck: its output by hand, its places and counts, its file, and what else is done with a model that has it."""

import copy
import json

import pytest
import torch
from torch.nn import functional

import tunekit as tk
from tunekit.core.run.checkpoint import trained_parameters
from tunekit.testing import tiny_model
from tunekit.testing.harness import Harness
from tunekit.testing.training import cross_entropy, distance, logits, train

CONTEXT = tk.Context(model_id="a/b")
BATCH = Harness().batch()
PLACES = {
    "houlsby": [f"model.layers.{n}.{place}" for n in (0, 1) for place in ("self_attn.o_proj", "mlp.down_proj")],
    "pfeiffer": [f"model.layers.{n}.mlp.down_proj" for n in (0, 1)],
}


def randomized(adapter, base):
    """The method on `base`, with all of its parameters random: up is no longer zero."""
    model = adapter.attach(base, CONTEXT)
    generator = torch.Generator().manual_seed(0)
    for parameter in trained_parameters(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    return model.eval()


def by_hand(tensors, ids, activation):
    """The logits of the tiny Llama with the modules among its tensors, written out from the papers."""

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * tensors[name]

    def after(x, layer):
        """The output of a linear layer, and behind it h + up(activation(down(h)))."""
        h = x @ tensors[f"{layer}.weight"].T
        module = f"{layer}.bottleneck_adapter"
        if f"{module}.down.weight" not in tensors:
            return h
        inner = activation(h @ tensors[f"{module}.down.weight"].T + tensors[f"{module}.down.bias"])
        return h + inner @ tensors[f"{module}.up.weight"].T + tensors[f"{module}.up.bias"]

    def turned(x):
        """Rotary positions on (heads, time, 8)."""
        angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** -(torch.arange(4) / 4)
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin

    x = tensors["model.embed_tokens.weight"][ids]  # (time, 32)
    for n in (0, 1):
        layer = f"model.layers.{n}"
        h = norm(x, f"{layer}.input_layernorm.weight")
        q, k, v = (
            (h @ tensors[f"{layer}.self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, 8)).transpose(0, 1)
            for name in "qkv"
        )  # (4, time, 8), twice (2, time, 8)
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        scores = turned(q) @ turned(k).transpose(1, 2) / 8**0.5
        future = torch.ones(len(ids), len(ids)).triu(1).bool()
        attended = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        x = x + after(attended.transpose(0, 1).flatten(1), f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm.weight")
        gate, up = (h @ tensors[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + after(functional.silu(gate) * up, f"{layer}.mlp.down_proj")
    return norm(x, "model.norm.weight") @ tensors["lm_head.weight"].T


@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_logits_and_gradients_are_those_of_the_formula_written_out(placement, activation):
    model = randomized(tk.Bottleneck(size=6, placement=placement, activation=activation), tiny_model())
    ids = BATCH["input_ids"][0][:20]
    found = model(ids[None]).logits[0]
    trained = list(trained_parameters(model))
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name in trained:
        tensors[name].requires_grad = True
    expected = by_hand(tensors, ids, getattr(functional, activation))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    functional.cross_entropy(found[:-1], ids[1:]).backward()
    functional.cross_entropy(expected[:-1], ids[1:]).backward()
    for name in trained:
        torch.testing.assert_close(model.get_parameter(name).grad, tensors[name].grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("adapter", "places"),
    [(tk.Bottleneck(placement=placement), PLACES[placement]) for placement in PLACES]
    + [(tk.Bottleneck(targets=("q_proj",)), [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)])]
    + [(tk.Bottleneck(targets=r".*\.1\.mlp\.up_proj"), ["model.layers.1.mlp.up_proj"])],
    ids=["houlsby", "pfeiffer", "names", "expression"],
)
def test_modules_stand_in_their_places(adapter, places):
    names = trained_parameters(adapter.attach(tiny_model(), CONTEXT))
    parts = ("down.weight", "down.bias", "up.weight", "up.bias")
    assert list(names) == [f"{place}.bottleneck_adapter.{part}" for place in places for part in parts]


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize(("placement", "modules"), [("houlsby", 4), ("pfeiffer", 2)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_module_has_2md_and_d_and_m_parameters(size, placement, modules, architecture):
    model = tk.Bottleneck(size=size, placement=placement).attach(tiny_model(architecture), CONTEXT)
    count = sum(parameter.numel() for parameter in trained_parameters(model).values())
    assert count == modules * (2 * size * 32 + 32 + size)


def test_other_modules_than_linear_layers_are_refused():
    with pytest.raises(tk.ConfigError, match=r"Bottleneck\.targets: model.embed_tokens is no linear layer; name"):
        tk.Bottleneck(targets=("embed_tokens",)).attach(tiny_model(), CONTEXT)


def test_a_layer_whose_end_has_another_name_is_named_with_what_there_is():
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.finish = layer.mlp.down_proj
        del layer.mlp.down_proj
    with pytest.raises(
        tk.ConfigError,
        match=r"cannot tell which layer ends the mlp block in model\.layers\.0, out of model\.layers\.0\.mlp\.gate_proj"
        r".*up_proj.*finish; name those of all layers",
    ):
        tk.Bottleneck().attach(model, CONTEXT)
    names = trained_parameters(tk.Bottleneck(targets=("finish",)).attach(model, CONTEXT))
    assert {name.split(".")[4] for name in names} == {"finish"}


# Its file ------------------------------------------------------------------------------------------------------------


def test_the_file_says_what_its_layout_is(tmp_path):
    adapter = tk.Bottleneck(size=3, activation="relu")
    adapter.save(adapter.attach(tiny_model(), CONTEXT), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bottleneck.json", "trained.safetensors"]
    stated = json.loads((tmp_path / "bottleneck.json").read_text(encoding="utf-8"))
    assert stated == {"size": 3, "placement": "houlsby", "activation": "relu", "names": PLACES["houlsby"]}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (tk.Bottleneck(size=4), "has other size: 3 there, 4 here"),
        (tk.Bottleneck(size=3, placement="pfeiffer"), "has other placement: houlsby there, pfeiffer here"),
        (tk.Bottleneck(size=3, activation="silu"), "has other activation: gelu there, silu here"),
        (tk.Bottleneck(size=3, targets=("q_proj",)), r"has other names: \['model.layers.0.self_attn.o_proj'.*q_proj"),
    ],
    ids=["size", "placement", "activation", "names"],
)
def test_another_layout_is_refused(other, message, tmp_path):
    adapter = tk.Bottleneck(size=3)
    adapter.save(adapter.attach(tiny_model(), CONTEXT), tmp_path)
    with pytest.raises(tk.ConfigError, match=message):
        other.load(tiny_model(), tmp_path)


def test_another_model_is_refused(tmp_path):
    adapter = tk.Bottleneck(size=3)
    adapter.save(adapter.attach(tiny_model(), CONTEXT), tmp_path)
    with pytest.raises(tk.ConfigError, match=r"is not of this model: \S+ is \(.*48.*\) here and \(.*32.*\) there"):
        adapter.load(tiny_model(hidden_size=48), tmp_path)
    with pytest.raises(tk.ConfigError, match="has other names"):
        adapter.load(tiny_model(num_hidden_layers=3), tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_a_missing_or_broken_layout_is_named(text, tmp_path):
    adapter = tk.Bottleneck(size=3)
    adapter.save(adapter.attach(tiny_model(), CONTEXT), tmp_path)
    (tmp_path / "bottleneck.json").unlink()
    if text:
        (tmp_path / "bottleneck.json").write_text(text, encoding="utf-8")
    with pytest.raises(tk.ConfigError, match=r"cannot read .*bottleneck\.json"):
        adapter.load(tiny_model(), tmp_path)


# What else is done with such a model ---------------------------------------------------------------------------------


def test_merging_is_not_supported_and_the_alternative_is_named():
    adapter = tk.Bottleneck()
    with pytest.raises(tk.NotSupported, match="keep the adapter and the base side by side"):
        adapter.merge(adapter.attach(tiny_model(), CONTEXT), CONTEXT)


def test_a_deep_copy_has_modules_of_its_own():
    model = randomized(tk.Bottleneck(size=6), tiny_model())
    before, other = logits(model, BATCH), copy.deepcopy(model)
    for parameter in trained_parameters(model).values():
        parameter.data.zero_()
    assert distance(logits(other, BATCH), before) == 0
    assert distance(logits(model, BATCH), before) > 1e-2


def test_two_models_of_one_class_have_nothing_in_common():
    plain = tiny_model()
    before = logits(plain, BATCH)
    model = randomized(tk.Bottleneck(size=6), tiny_model())
    assert distance(logits(plain, BATCH), before) == 0
    assert distance(logits(model, BATCH), before) > 1e-2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_with_gradient_checkpointing(reentrant):
    found, calls = [], []
    for checkpointing in (False, True):
        model = randomized(tk.Bottleneck(size=6), tiny_model(use_cache=False)).train()
        if checkpointing:
            # transformers 5.23 renamed it.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: calls.append(1))
        cross_entropy(model, BATCH).backward()
        found.append({name: parameter.grad for name, parameter in trained_parameters(model).items()})
    assert len(calls) == 2, "the layer was recomputed"
    assert all(grad.any() for grad in found[0].values())
    torch.testing.assert_close(found[1], found[0])


def test_generation_with_a_cache_is_that_without():
    model = randomized(tk.Bottleneck(size=6), tiny_model())
    ids = BATCH["input_ids"][:1, :9]
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    step_by_step = ids
    for _ in range(12):
        step_by_step = torch.cat([step_by_step, model(step_by_step).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, step_by_step)


def test_a_checkpoint_of_such_a_model_holds_its_base_under_the_names_of_the_base(tmp_path):
    from safetensors.torch import load_file

    base = tiny_model().state_dict()
    randomized(tk.Bottleneck(size=6), tiny_model()).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert base.keys() <= stored.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in base.items())


def test_over_a_bfloat16_base_its_parameters_are_float32_and_the_sum_is_rounded_once():
    model = randomized(tk.Bottleneck(size=6, activation="relu"), tiny_model().bfloat16())
    assert {parameter.dtype for parameter in trained_parameters(model).values()} == {torch.float32}
    layer = model.model.layers[0].mlp.down_proj
    inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    h = (inputs @ layer.weight.T).float()
    module = layer.bottleneck_adapter
    exact = h + functional.relu(h @ module.down.weight.T + module.down.bias) @ module.up.weight.T + module.up.bias
    assert torch.equal(layer(inputs), exact.bfloat16())
    adapter = tk.Bottleneck(size=6)
    model = adapter.attach(tiny_model().bfloat16(), CONTEXT)
    losses = train(adapter, model, BATCH, 8)
    assert losses[-1] < losses[0]


def test_a_run_can_be_resumed_opened_and_asked_and_says_why_it_is_not_exported(tiny_directory, tmp_path):
    pipeline = tk.Pipeline(
        model=str(tiny_directory),
        data=tk.InMemory(rows=[{"prompt": f"repeat {n}", "completion": f"{n} {n}"} for n in range(13)]),
        adapter=tk.Bottleneck(size=8),
        trainer=tk.SFT(max_steps=6, batch_size=4, learning_rate=1e-2),
    )
    run = pipeline.run(tmp_path / "run")
    assert run.metrics["nll"] < run.base_metrics["nll"]
    again = tk.open_run(tmp_path / "run")
    assert again.generate("repeat 3", max_new_tokens=8) == run.generate("repeat 3", max_new_tokens=8)
    assert distance(logits(again._model(tuned=True).model, BATCH), logits(run._model(tuned=True).model, BATCH)) == 0
    with pytest.raises(tk.NotSupported, match="bottleneck: cannot be merged into its base"):
        run.export(tmp_path / "merged")
