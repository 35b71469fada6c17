"""Int8 keeps one scale a row, gives its weights back, and is silent."""

import logging

import pytest
import torch

import tunekit as tk
from tunekit.testing import tiny_model
from tunekit.testing.harness import quantized

pytest.importorskip("bitsandbytes")

CONTEXT = tk.Context(model_id="tiny", device="cpu", dtype="float32", quantization="int8")


def layers(model):
    return {name: module for name, module in model.named_modules() if tk.Int8().is_quantized(module)}


def test_a_weight_is_rounded_to_127_steps_of_the_largest_of_its_row():
    plain = dict(tiny_model().named_modules())
    for name, layer in layers(quantized(tiny_model(), tk.Int8(), CONTEXT)).items():
        weight = plain[name].weight.detach()
        scale = weight.half().float().abs().amax(1, keepdim=True) / 127
        found = tk.Int8().dequantize(layer)
        assert (found - weight).abs().max() <= 0.51 * scale.max()
        torch.testing.assert_close(found / scale, (found / scale).round(), rtol=0, atol=1e-3)


def test_it_gives_back_what_it_computes_with_before_and_after_the_first_pass():
    model = quantized(tiny_model(), tk.Int8(), CONTEXT)
    for layer in layers(model).values():
        before = tk.Int8().dequantize(layer)
        found = layer.train()(torch.eye(layer.in_features)).T
        torch.testing.assert_close(found, before, rtol=1e-6, atol=1e-8)
        assert torch.equal(tk.Int8().dequantize(layer), before)


def test_it_says_nothing_in_every_forward_pass(caplog):
    model = quantized(tiny_model(), tk.Int8(), CONTEXT)
    with caplog.at_level(logging.INFO), torch.no_grad():
        model(torch.arange(9)[None])
    assert caplog.records == []


def test_its_scales_survive_a_move_of_its_weight():
    model = quantized(tiny_model(), tk.Int8(), CONTEXT)
    layer = next(iter(layers(model).values()))
    inputs = torch.eye(layer.in_features)
    expected = layer(inputs)
    layer.weight = layer.weight.to("cpu")  # as PEFT does in every forward pass of DoRA
    assert torch.equal(layer(inputs), expected)
