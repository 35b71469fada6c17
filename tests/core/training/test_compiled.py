"""Compiled layers give the gradient that plain ones give, and are plain again after training."""

import pytest
import torch
from sharp_models import sharp
from test_rows_loss import alone, best, loss_and_gradient, rows
from transformers import LlamaConfig

from tunekit.core.training import compiled
from tunekit.core.training.compiled import decoder_layers, worthwhile
from tunekit.testing import tiny_model

# While it compiles, torch warns of what it does itself.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("User", "Deprecation", "Future")]
ONE_LAYER = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def _fresh():
    yield
    torch.compiler.reset()


def one_layer():
    return sharp(LlamaConfig(**ONE_LAYER, vocab_size=100, num_key_value_heads=2))


def test_rows_of_other_lengths_compile_nothing_more_and_outside_of_training_layers_are_plain(monkeypatch):
    graphs = []

    def counting(graph, inputs):  # all that inductor does but its kernels, which take minutes
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(compiled, "BACKEND", counting)
    model = one_layer().eval()
    layer, names = decoder_layers(model)[0], list(model.state_dict())
    way = best(model, compiling=True)
    assert (way.padding_free, way.chunked, way.compiled, way.notes) == (True, True, True, ())
    assert graphs
    assert not model.training  # as it was
    assert all(parameter.grad is None for parameter in model.parameters())
    model.train()
    loss_and_gradient(way, rows())
    there = len(graphs)
    for lengths in ((7, 13, 5, 21), (6, 9), (4, 30, 5, 6, 8)):
        expected, gradient = alone(model, rows(lengths))
        loss, found = loss_and_gradient(way, rows(lengths))
        assert loss == pytest.approx(expected, rel=1e-6)
        assert ((found - gradient).norm() / gradient.norm()).item() < 1e-5
    assert len(graphs) == there
    with way.training():
        assert layer._compiled_call_impl is not None
        assert list(model.state_dict()) == names
        with way.paused():
            assert layer._compiled_call_impl is None
        assert layer._compiled_call_impl is not None
    assert layer._compiled_call_impl is None


def test_what_cannot_be_compiled_is_trained_as_it_is_and_says_why(monkeypatch):
    def no_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(compiled, "BACKEND", no_compiler)
    model = one_layer()
    way = best(model, compiling=True)
    assert (way.padding_free, way.chunked, way.compiled) == (True, True, False)
    assert "no compiled layers" in way.notes[0]
    assert "no C++ compiler" in way.notes[0]
    assert decoder_layers(model)[0]._compiled_call_impl is None


def test_a_model_that_does_not_name_its_layers_is_not_compiled():
    model = tiny_model()
    model._no_split_modules = None
    way = best(model, compiling=True)
    assert not way.compiled
    assert "does not name its layers" in way.notes[0]


def test_auto_compiles_where_the_steps_repay_it():
    steps = compiled.WORTHWHILE_STEPS
    assert [worthwhile("auto", steps - 1), worthwhile("auto", steps)] == [False, True]
    assert [worthwhile(True, 1), worthwhile(False, steps)] == [True, False]
