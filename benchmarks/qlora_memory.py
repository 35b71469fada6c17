"""The peak memory of QLoRA on a model of random weights, beside what the formula says.

    python benchmarks/qlora_memory.py --shape 7b          # on a CUDA device with 24 GiB, and 14 GB of disk

By the formula, a linear weight takes 4.127 bits (NF4 with double quantization, Dettmers et al. 2023), any other weight
two bytes, and a trained parameter 16: itself, its gradient and AdamW's two moments in float32. What activations and
workspace take on top is the difference. On the CPU the figures are those of the formula alone: the memory of a process
does not tell its parts apart.
"""

import argparse
import tempfile
from pathlib import Path

SHAPES = {
    "7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}
ROWS = [{"prompt": f"What is {n} + {n}?", "completion": "word " * 100 + str(2 * n)} for n in range(16)]
BITS = 4 + 8 / 64 + 32 / (64 * 256)


def formula(model, trained):
    """Bytes of weights and of what training them needs.

    Args:
        model: on the meta device, without an adapter.
        trained: trained parameters.
    """
    from tunekit.core.model.targets import linear_layers

    head = model.get_output_embeddings()
    packed = sum(layer.weight.numel() for layer in linear_layers(model).values() if layer is not head)
    rest = sum(parameter.numel() for parameter in model.parameters()) - packed
    return packed * BITS / 8 + rest * 2 + trained * 16


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args(arguments)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    import tunekit as tk
    from tunekit.core.common.assets import resolve

    cuda = torch.cuda.is_available()
    config = LlamaConfig(**SHAPES[options.shape], max_position_embeddings=2048, eos_token_id=2, pad_token_id=3)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        with torch.device("cuda" if cuda else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(place / "model")
        AutoTokenizer.from_pretrained(resolve(tk.TINY)).save_pretrained(place / "model")
        del model
        pipeline = tk.Pipeline(
            model=place / "model",
            data=tk.InMemory(rows=ROWS),
            validation=0.0,
            adapter=tk.QLoRA(rank=options.rank),
            trainer=tk.SFT(max_steps=options.steps, batch_size=4, gradient_checkpointing=True, keep_dequantized=0),
            dtype="bfloat16",
        )
        plan = pipeline.plan()
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        expected = formula(empty, plan.trainable_parameters)
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        pipeline.run(place / "run")
        print(f"trained parameters   {plan.trainable_parameters:,} of {plan.total_parameters:,}")
        print(f"by the formula       {expected / 2**30:.3f} GiB")
        if cuda:
            peak = torch.cuda.max_memory_allocated()
            print(
                f"measured peak        {peak / 2**30:.3f} GiB, {(peak - expected) / 2**30:.3f} GiB of it for the rest"
            )
        else:
            print("measured peak        no CUDA device here")
    return expected


if __name__ == "__main__":
    main()
