"""Methods of anybody's over a bfloat16 base: what they train is float32, learns, and comes back as it was."""

import copy

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file

import tunekit as tk
from tunekit.core.model import attaching
from tunekit.core.run.checkpoint import trained_parameters
from tunekit.testing import tiny_model
from tunekit.testing.harness import ROWS

IDS = torch.arange(5, 60)[None]


@attrs.frozen(kw_only=True)
class Norms(tk.AdapterMethod):
    """Train the norms, and know nothing of dtypes."""

    name = "norms-alone"

    def attach(self, model, context):
        for parameter in model.parameters():
            parameter.requires_grad = parameter.dim() == 1
        return model

    def save(self, model, directory):
        save_file(trained_parameters(model), directory / "norms.safetensors")

    def load(self, model, directory):
        model.load_state_dict(load_file(directory / "norms.safetensors"), strict=False)
        return model

    def merge(self, model, context):
        return copy.deepcopy(model)


@attrs.frozen(kw_only=True)
class Wide(Norms):
    """Shift the output of every MLP by a float32 vector, which makes it float32."""

    name = "wide"

    def attach(self, model, context):
        model.requires_grad_(False)
        for layer in model.model.layers:
            device = layer.mlp.down_proj.weight.device
            shift = torch.nn.Parameter(torch.zeros(model.config.hidden_size, device=device))
            layer.input_layernorm.register_parameter("shift", shift)
            layer.input_layernorm.register_forward_hook(lambda module, _, output: output + module.shift)
        return model


def pipeline(model, adapter, **options):
    fields = {
        "data": tk.InMemory(rows=ROWS),
        "validation": 0.3,
        "trainer": tk.SFT(max_steps=3, batch_size=4, learning_rate=1e-3),
        "dtype": "bfloat16",
        "device": "cpu",
    }
    return tk.Pipeline(model=str(model), adapter=adapter, **{**fields, **options})


@pytest.mark.parametrize("adapter", [Norms(), tk.Full(), tk.LastLayers(count=1), tk.LoRA(rank=2, bias="all")])
def test_what_was_trained_is_saved_opened_and_exported_as_it_is(adapter, tiny_directory, tmp_path):
    run = pipeline(tiny_directory, adapter).run(tmp_path / "run")
    again = pipeline(tiny_directory, adapter)._finished(run.directory)
    live, opened = run._model(tuned=True).model, again._model(tuned=True).model
    trained = trained_parameters(live)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in trained.values())
    frozen = {p.dtype for p in live.parameters() if not p.requires_grad}
    assert frozen <= {torch.bfloat16}
    there = dict(opened.named_parameters())
    assert all(torch.equal(value, there[name]) for name, value in trained.items())
    with torch.no_grad():
        expected = live(IDS).logits
        assert expected.dtype == torch.bfloat16
        assert torch.equal(opened(IDS).logits, expected)
    assert run.generate("one", max_new_tokens=4) == again.generate("one", max_new_tokens=4)
    written = load_file(run.export(tmp_path / "merged", dtype="float32") / "model.safetensors")
    if not isinstance(adapter, tk.LoRA):
        assert all(torch.equal(value, written[name]) for name, value in trained.items())


@pytest.mark.parametrize("adapter", [Norms(), tk.Full(), tk.LastLayers(count=1)])
def test_a_run_that_goes_on_ends_where_one_that_was_not_stopped_does(adapter, tiny_directory, tmp_path):
    class Stop:
        @tk.hookimpl
        def tunekit_saved(self, step):
            if step == 2:
                raise KeyboardInterrupt

    trainer = tk.SFT(max_steps=4, batch_size=2, learning_rate=1e-3, save_every=2, background_saving=False)
    one, other = (pipeline(tiny_directory, adapter, trainer=trainer) for _ in range(2))
    whole = one.run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        other.run(tmp_path / "stopped", observers=[Stop()])
    resumed = other.run(tmp_path / "stopped", resume=True)
    expected = trained_parameters(whole._model(tuned=True).model)
    found = trained_parameters(resumed._model(tuned=True).model)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_one_that_widens_activations_is_named_with_the_dtype_and_the_way_out(tiny_directory, tmp_path):
    told = r"Pipeline.adapter: wide does not compute over a base in bfloat16 \(.*\): .*set dtype='float32'"
    with pytest.raises(tk.ConfigError, match=told):
        pipeline(tiny_directory, Wide()).run(tmp_path / "run")
    pipeline(tiny_directory, Wide(), dtype="float32").run(tmp_path / "float32")


def test_another_error_of_torch_is_left_as_it_is():
    with (
        pytest.raises(RuntimeError, match=r"^shapes$"),
        attaching.explained(tk.LoRA(), tk.Context(model_id="a", dtype="bfloat16")),
    ):
        raise RuntimeError("shapes")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_that_is_not_trained_keeps_its_bits(dtype):
    base = tiny_model().to(getattr(torch, dtype))
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    model = attaching.attach(Norms(), base, tk.Context(model_id="tiny", dtype=dtype))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name].to(parameter.dtype))
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else before[name].dtype)


@pytest.mark.real
def test_norms_alone_learn_in_bfloat16_what_they_learn_in_float32(shared, tmp_path):
    words = ("dog", "cat", "little girl named Lily", "boy")
    rows = tuple({"text": f"Once upon a time there was a {word} who lived in a forest."} for word in words)
    fallen = {}
    for dtype in ("float32", "bfloat16"):
        run = pipeline(
            shared / "models" / "stories260k",
            Norms(),
            data=tk.InMemory(rows=rows),
            validation=0.0,
            evaluators=(),
            trainer=tk.SFT(max_steps=8, batch_size=4, learning_rate=1e-2, log_every=1),
            dtype=dtype,
        ).run(tmp_path / dtype)
        first, *_, last = (line["loss"] for line in run.history if "loss" in line)
        fallen[dtype] = first - last
    assert fallen["float32"] > 0.4
    assert fallen["bfloat16"] == pytest.approx(fallen["float32"], rel=0.05)  # it was 0, steps being rounded away
