"""Training over quantized bases: right gradients, a whole life through the pipeline, and an export that is the model."""

import json

import attrs
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import tunekit as tk
from tunekit.core.common.assets import resolve
from tunekit.core.model.dequantize import dequantize
from tunekit.core.run.checkpoint import trained_parameters
from tunekit.core.run.measuring import measure
from tunekit.testing import tiny_model
from tunekit.testing.harness import Harness, quantized
from tunekit.testing.training import cross_entropy, logits

pytest.importorskip("bitsandbytes")
# The tiny model has layers of 32 inputs, for which the quick kernel of CUDA is not made.
pytestmark = pytest.mark.filterwarnings("ignore:.*inner dimension.*is not aligned")

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
METHODS = (
    tk.LoRA(rank=4),
    tk.LoRA(rank=4, variant="dora"),
    tk.AdaLoRA(initial_rank=4, target_rank=2),
    tk.IA3(targets="all-linear"),
    tk.LoHa(rank=4),
    tk.LoKr(rank=2),
)
CASES = {
    "qlora": {"adapter": tk.QLoRA(rank=8)},
    "nf4": {"adapter": tk.LoRA(rank=8), "quantizer": tk.NF4(double_quantization=False)},
    "int8": {"adapter": tk.LoRA(rank=8), "quantizer": tk.Int8()},
}


def facts(quantizer, device="cpu", dtype="float32"):
    scheme = quantizer.scheme if quantizer else None
    return tk.Context(model_id="tiny", device=device, dtype=dtype, quantization=scheme)


def make(**parts):
    trainer = tk.SFT(max_steps=12, batch_size=4, learning_rate=4e-3)
    return tk.Pipeline(model=tk.TINY, data=tk.JsonLines(path=tk.ORDERS), device="cpu", trainer=trainer, **parts)


def nll(pipeline, model):
    """Of the held-out rows."""
    data = pipeline._data(pipeline._base.codec(), None)
    context = pipeline._context(device="cpu")
    evaluators = pipeline.evaluators
    return measure(
        evaluators, model.eval(), tokenizer=pipeline._base.codec().tokenizer, rows=data.validation, context=context
    )["nll"]


@pytest.fixture(scope="module", params=CASES)
def finished(request, tmp_path_factory):
    pipeline = make(**CASES[request.param])
    return pipeline, pipeline.run(tmp_path_factory.mktemp(request.param) / "run")


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("quantizer", [tk.NF4(), tk.NF4(double_quantization=False), tk.Int8()], ids=repr)
@pytest.mark.parametrize(
    ("adapter", "architecture"),
    [(adapter, "llama") for adapter in METHODS] + [(adapter, "gpt2") for adapter in METHODS if adapter.adapts_conv1d],
    ids=lambda value: getattr(value, "name", value),
)
def test_gradients_are_those_over_a_float32_model_with_the_dequantized_weights(
    adapter, quantizer, device, architecture
):
    context = facts(quantizer, device)
    batch = {name: value.to(device) for name, value in Harness().batch().items()}
    found = []
    for plain in (False, True):
        base = quantized(tiny_model(architecture), quantizer, context)
        base = dequantize(base, quantizer) if plain else base
        torch.manual_seed(0)
        model = adapter.attach(base, attrs.evolve(context, total_steps=20))
        with torch.no_grad():
            for parameter in trained_parameters(model).values():  # away from the start, where some gradients are zero
                parameter.add_(torch.randn(parameter.shape).to(device) / 10)
        logits(model, batch)  # an evaluation in between changes nothing
        cross_entropy(model.train(), batch).backward()
        found.append([parameter.grad.cpu() for parameter in trained_parameters(model).values()])
    scale = max(float(grad.abs().max()) for grad in found[1])
    rounded_activations = device == "cuda" and quantizer.scheme == "int8"
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=(0.05 if rounded_activations else 1e-5) * scale)


def test_the_loss_falls_and_the_run_can_be_opened_and_asked(finished):
    pipeline, run = finished
    assert run.metrics["nll"] < run.base_metrics["nll"] - 1
    again = tk.open_run(run.directory)
    assert again.generate("What is 2 + 3?", max_new_tokens=8) == run.generate("What is 2 + 3?", max_new_tokens=8)
    assert {parameter.dtype for parameter in trained_parameters(run._model(True).model).values()} <= {torch.float32}
    parameters = json.loads((run.directory / "result.json").read_text())["parameters"]
    plan = pipeline.plan()
    assert parameters == {"trainable": plan.trainable_parameters, "total": plan.total_parameters}


def test_an_export_is_a_plain_model_that_predicts_what_the_quantized_one_did(finished, tmp_path):
    pipeline, run = finished
    exported = AutoModelForCausalLM.from_pretrained(run.export(tmp_path / "merged"))
    assert exported.dtype == torch.float32
    assert not hasattr(exported.config, "quantization_config")
    away = abs(nll(pipeline, exported) - run.metrics["nll"])
    # The live model rounds activations, too, over Int8; test_every_method.py compares without that.
    assert away <= (1e-3 if pipeline._quantizer.scheme == "nf4" else 5e-3)
    # Rounded again into 4 bits, most of the training is undone; 8 bits are fine enough.
    quantizer, context = pipeline._quantizer, pipeline._context(device="cpu", dtype="float32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **quantizer.load_kwargs(context))
    lost = nll(pipeline, quantizer.prepare(again, context)) - run.metrics["nll"]
    assert lost > 0.5 if quantizer.scheme == "nf4" else abs(lost) < 5e-3
    # Put onto the weights from before they were quantized, it misses too: it was not trained on these.
    adapter, directory = pipeline.adapter, run.directory / "adapter"
    original = adapter.load(AutoModelForCausalLM.from_pretrained(resolve(tk.TINY)), directory)
    missed = abs(nll(pipeline, adapter.merge(original, facts(None))) - run.metrics["nll"])
    assert missed > 1e-3


def test_an_export_is_written_in_the_dtype_that_is_asked_for(finished, tmp_path):
    _, run = finished
    whole = AutoModelForCausalLM.from_pretrained(run.export(tmp_path / "whole")).state_dict()
    half = AutoModelForCausalLM.from_pretrained(run.export(tmp_path / "half", dtype="bfloat16")).state_dict()
    assert all(torch.equal(half[name], tensor.to(torch.bfloat16)) for name, tensor in whole.items())


def test_over_bfloat16_the_adapter_is_trained_in_float32_and_the_sum_is_rounded_once(tmp_path):
    run = make(adapter=tk.QLoRA(rank=4), dtype="bfloat16").run(tmp_path / "run")
    assert {parameter.dtype for parameter in run._model(True).model.parameters() if parameter.requires_grad} == {
        torch.float32
    }
    written = AutoModelForCausalLM.from_pretrained(run.export(tmp_path / "merged"))
    exact = AutoModelForCausalLM.from_pretrained(run.export(tmp_path / "exact", dtype="float32"))
    assert written.dtype == torch.bfloat16
    assert exact.dtype == torch.float32
    exact = exact.state_dict()
    assert all(torch.equal(tensor, exact[name].to(torch.bfloat16)) for name, tensor in written.state_dict().items())


def test_an_export_without_quantization_can_be_written_in_another_dtype(tmp_path):
    run = make(adapter=tk.LoRA(rank=4), dtype="bfloat16").run(tmp_path / "run")
    written = AutoModelForCausalLM.from_pretrained(run.export(tmp_path / "merged")).state_dict()
    exact = AutoModelForCausalLM.from_pretrained(run.export(tmp_path / "exact", dtype="float32")).state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in exact.values())
    assert all(torch.equal(written[name], tensor.to(torch.bfloat16)) for name, tensor in exact.items())
    assert any(not torch.equal(written[name].float(), tensor) for name, tensor in exact.items())


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("quantizer", [tk.NF4(), tk.Int8()], ids=repr)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_dequantized_model_is_built_as_its_base_and_predicts_what_the_quantized_one_does(
    quantizer, architecture, device
):
    context, batch = facts(quantizer, device), Harness().batch()
    batch = {name: value.to(device) for name, value in batch.items()}
    model = quantized(tiny_model(architecture), quantizer, context)
    expected = logits(model, batch)
    plain = dequantize(model, quantizer)
    shapes = {name: tensor.shape for name, tensor in tiny_model(architecture).state_dict().items()}
    assert {name: tensor.shape for name, tensor in plain.state_dict().items()} == shapes
    away = (logits(plain, batch) - expected).norm() / expected.norm()
    assert away <= (1e-5 if quantizer.scheme == "nf4" else 0.05)  # Int8 rounds activations in evaluation


@pytest.mark.parametrize("adapter", [tk.Full(), tk.LastLayers()], ids=lambda adapter: adapter.name)
@pytest.mark.parametrize("quantizer", [tk.NF4(), tk.Int8()], ids=lambda quantizer: quantizer.name)
def test_a_method_that_trains_the_weights_themselves_is_refused_with_what_to_do_instead(adapter, quantizer):
    problem = (
        f"{adapter.name} cannot train on a {quantizer.scheme} base; it supports none: quantize nothing, or choose LoRA"
    )
    with pytest.raises(tk.ConfigError, match=problem):
        make(adapter=adapter, quantizer=quantizer).check()


def test_a_variant_that_does_not_support_the_scheme_is_refused():
    with pytest.raises(tk.ConfigError, match=r"LoRA\.variant: pissa cannot start from nf4 weights"):
        make(adapter=tk.LoRA(variant="pissa"), quantizer=tk.NF4()).check()


def test_the_bytes_of_the_parameters_fall():
    def size(model):
        return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

    def model():
        fields = {"vocab_size": 261, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        return LlamaForCausalLM(LlamaConfig(**fields, num_attention_heads=4))

    plain = size(model())
    head_and_norms = 4 * (2 * 261 * 64 + 5 * 64)
    linear = plain - head_and_norms
    assert size(quantized(model(), tk.NF4(), facts(tk.NF4()))) == head_and_norms + linear // 8
    assert size(quantized(model(), tk.Int8(), facts(tk.Int8()))) == head_and_norms + linear // 4
