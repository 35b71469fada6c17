"""The formulas of the literature, beside figures that were computed and published elsewhere.

Sources: Llama-2 and Mistral model cards (shapes); Stanford Alpaca's README (112 GB); EleutherAI's cookbook
(`calc_transformer_mem.py`, its line for llama-7B at 4,096 tokens: 97.00 GiB of activations); Dettmers et al. 2023 (bits).
"""

import math
from functools import cache

import pytest

import tunekit as tk
from tunekit.core.memory.estimate import MIXED_ADAMW, activation_bytes, is_roomy
from tunekit.core.run.plan import count_parameters
from tunekit.testing import tiny_model

SHAPES = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "mistral-7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
SEVEN = {"hidden": 4096, "heads": 32, "layers": 32}


@cache
def empty(name):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32000, **SHAPES[name]))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-7b", 6_738_415_616), ("mistral-7b", 7_241_732_096), ("llama-2-70b", 68_976_648_192)],
)
def test_parameters_of_published_shapes(name, parameters):
    assert count_parameters(empty(name)) == (parameters, parameters)


def test_full_fine_tuning_in_mixed_precision():
    each = sum(MIXED_ADAMW.values())
    assert each * 7e9 == 126e9
    assert each * 70e9 == 1260e9
    assert math.ceil(each * 70e9 / 80e9) == 16, "A100 with 80 GB"
    assert (each - MIXED_ADAMW["gradients"] + 2) * 7e9 == 112e9, "gradients in 16 bits"


@pytest.mark.parametrize(
    ("length", "everything", "selective", "inputs"),
    [(512, 3.6, 2.3, 0.1), (1024, 9.9, 4.6, 0.3), (2048, 30.6, 9.1, 0.5), (4096, 104.2, 18.3, 1.1)],
)
def test_activations_of_seven_billion_parameters(length, everything, selective, inputs):
    found = {
        kept: activation_bytes(rows=1, length=length, kept=kept, **SEVEN) / 1e9
        for kept in ("all", "selective", "layer inputs")
    }
    assert found == pytest.approx({"all": everything, "selective": selective, "layer inputs": inputs}, abs=0.051)


def test_all_of_seven_billion_parameters_and_of_a_published_script():
    activations = activation_bytes(rows=1, length=2048, **SEVEN)
    assert (18 * 6_738_415_616 + activations) / 1e9 == pytest.approx(151.9, abs=0.05)
    assert activation_bytes(rows=1, length=4096, **SEVEN) / 2**30 == pytest.approx(97.00, abs=0.05)


@pytest.mark.parametrize(
    ("parameters", "double", "single"), [(7e9, 3.61, 3.94), (65e9, 33.5, 36.6), (70e9, 35.6, 38.8)]
)
def test_four_bit_weights(parameters, double, single):
    """The golden figures count every parameter as quantized; these are of one weight, times so many."""
    import torch

    weight = torch.empty(4096, 4096, device="meta")
    for nested, expected in ((True, double), (False, single)):
        stored = sum(tk.NF4(double_quantization=nested).stored_bytes(weight)) / weight.numel()
        rounding = 0.051 if expected > 10 else 0.0051
        scale = {7e9: 7e9, 65e9: 65e9, 70e9: 68.976648192e9}[parameters]
        assert stored * scale / 1e9 == pytest.approx(expected, abs=rounding)


def test_only_where_there_is_plenty_nothing_is_counted():
    from transformers import PreTrainedConfig

    config = tiny_model().config
    assert is_roomy(config, tokens=4096, longest=64, batch=16, budget=2**30)
    assert not is_roomy(config, tokens=4096, longest=64, batch=16, budget=2**20)
    silent = PreTrainedConfig()
    assert not is_roomy(silent, tokens=1, longest=1, batch=1, budget=2**40), "it does not say how large the model is"
