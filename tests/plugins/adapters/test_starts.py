"""Before the first step a model predicts what its base does, to the last bit, in either dtype and over three families.

Llama has neither biases nor Conv1D, GPT-2 has both and tied ends, Qwen2 has biases in its attention alone.
"""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import tunekit as tk
from tunekit.core.model import attaching
from tunekit.testing import tiny_model

IDS = torch.randint(5, 260, (2, 12), generator=torch.Generator().manual_seed(0))
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
METHODS = {
    "LoRA": tk.LoRA(rank=4),
    "rsLoRA": tk.LoRA(rank=4, variant="rslora"),
    "DoRA": tk.LoRA(rank=4, variant="dora"),
    "LoRA, biases": tk.LoRA(rank=4, bias="all"),
    "AdaLoRA": tk.AdaLoRA(initial_rank=4, target_rank=2),
    "IA3": tk.IA3(),
    "LoHa": tk.LoHa(rank=4),
    "LoKr": tk.LoKr(rank=4),
    "Bottleneck": tk.Bottleneck(size=4),
    "Full": tk.Full(),
    "LastLayers": tk.LastLayers(count=1),
}
CONV1D = {"LoHa", "LoKr"}
"""Methods of PEFT's that cannot adapt Conv1D."""


def base(family: str, dtype: str):
    if family == "qwen2":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, vocab_size=261, num_key_value_heads=2))
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter)  # zero at first
    else:
        model = tiny_model(family)
    return model.to(getattr(torch, dtype)).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_every_method_that_starts_as_its_base_does_to_the_last_bit(family, dtype):
    expected = logits(base(family, dtype))
    away = {}
    for name, method in METHODS.items():
        if family == "gpt2" and name in CONV1D:
            continue
        assert method.starts_as_base
        context = tk.Context(model_id="tiny", device="cpu", dtype=dtype, total_steps=20)
        found = logits(attaching.attach(method, base(family, dtype), context))
        away[name] = float((found - expected).abs().max())
    assert away == dict.fromkeys(away, 0.0)


@pytest.mark.parametrize("quantizer", [tk.NF4(), tk.Int8()])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_so_does_dora_over_a_quantized_base(quantizer, dtype):
    from tunekit.testing.harness import Harness, attached

    harness = Harness(quantizer=quantizer, dtype=dtype)
    expected = logits(harness.model())
    assert torch.equal(logits(attached(METHODS["DoRA"], harness)), expected)


@pytest.mark.parametrize(("dtype", "away"), [("float32", 1e-6), ("bfloat16", 2**-6)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_pissa_starts_within_the_rounding_of_what_it_leaves_of_each_weight(family, dtype, away):
    expected = logits(base(family, dtype)).float()
    context = tk.Context(model_id="tiny", device="cpu", dtype=dtype)
    found = logits(tk.LoRA(rank=4, variant="pissa").attach(base(family, dtype), context)).float()
    assert (found - expected).abs().max() <= away * expected.abs().max()
