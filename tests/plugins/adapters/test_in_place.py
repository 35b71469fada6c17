"""Full and LastLayers train parameters of the model itself, and refuse files of another one."""

import pytest

import tunekit as tk
from tunekit.core.run.checkpoint import trained_parameters
from tunekit.testing import tiny_model

CONTEXT = tk.Context(model_id="a/b")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_full_trains_every_parameter(architecture):
    model = tiny_model(architecture)
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert (
        sum(parameter.numel() for parameter in trained_parameters(tk.Full().attach(model, CONTEXT)).values())
        == expected
    )


def test_last_layers_are_counted_from_the_last():
    names = trained_parameters(tk.LastLayers(count=2).attach(tiny_model(num_hidden_layers=12), CONTEXT))
    assert {name.split(".")[2] for name in names} == {"10", "11"}
    assert all(name.startswith("model.layers.") for name in names)
    # Four square projections of 32 (keys and values at half the width), three of 32 * 64, and two norms.
    assert sum(parameter.numel() for parameter in names.values()) == 2 * (3 * 32 * 32 + 3 * 32 * 64 + 2 * 32)


def test_more_layers_than_there_are_is_an_error():
    with pytest.raises(tk.ConfigError, match=r"LastLayers\.count: the model has 2 layers, so 3 are too many"):
        tk.LastLayers(count=3).attach(tiny_model(), CONTEXT)


@pytest.mark.parametrize("method", [tk.Full(), tk.LastLayers(count=1)])
@pytest.mark.parametrize("other", [{"intermediate_size": 32}, {"num_hidden_layers": 3}], ids=str)
def test_what_was_saved_of_one_model_does_not_fit_another(method, other, tmp_path):
    method.save(method.attach(tiny_model(), CONTEXT), tmp_path)
    with pytest.raises(tk.ConfigError, match=r"is not of this model: model\.layers\.\d\.\S+ is .* here and .* there"):
        method.load(tiny_model(**other), tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(tk.ConfigError, match=r"cannot read .*trained\.safetensors"):
        tk.Full().load(tiny_model(), tmp_path)


def test_both_are_refused_on_a_quantized_base():
    assert not tk.Full.supports
    assert not tk.LastLayers.supports
