"""How long a training step takes by method, relative to LoRA, by lean forwards and by PEFT's.

    python benchmarks/methods.py --shape 135m --rows 8 --tokens 128 --steps 5 --out benchmarks/results/methods.json

All methods train on a model of random weights, by default in the shape of SmolLM2-135M, on the same rows without
padding, in one process and in turn, step by step, so that what else the machine does falls on all of them. A step is
forward, backward and AdamW. Compared are medians of ratios to the LoRA step of the same round. Before anything is
timed, each method's first loss by lean forwards must be that by PEFT's.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

SHAPES = {
    "135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
    },
    # Two of the 28 layers of Llama-3.2-3B (its config.json), and a fourth of its vocabulary: the model on which PEFT
    # compares methods, by layers, in the memory of a small machine.
    "3b": {
        "hidden_size": 3072,
        "num_hidden_layers": 2,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 32000,
    },
    "small": {
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1408,
        "vocab_size": 8000,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 200,
    },
}
METHODS = ("LoRA", "DoRA", "AdaLoRA", "IA3", "LoHa", "LoKr", "QLoRA", "QLoRA, nothing kept")
WAYS = ("lean", "PEFT")


def adapter_of(method):
    """The method as users have it by default, but for the rank of LoRA's kin."""
    import tunekit as tk

    return {
        "LoRA": tk.LoRA(rank=16),
        "DoRA": tk.LoRA(rank=16, variant="dora"),
        "AdaLoRA": tk.AdaLoRA(initial_rank=16, target_rank=8),
        "IA3": tk.IA3(),
        "LoHa": tk.LoHa(),
        "LoKr": tk.LoKr(),
    }.get(method, tk.QLoRA(rank=16))


def base_of(shape, quantized, directory):
    """A model of random weights, which bitsandbytes quantizes where it is loaded."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import tunekit as tk
    from tunekit.core.model.base import no_progress_bars

    place = Path(directory) / "base"
    if not place.exists():
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, tie_word_embeddings=True)
        with no_progress_bars():
            AutoModelForCausalLM.from_config(config).save_pretrained(place)
    context = tk.Context(model_id="benchmark", device="cpu", dtype="float32", quantization="nf4")
    options = tk.NF4().load_kwargs(context) if quantized else {}
    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, device_map="cpu", **options)
    return tk.NF4().prepare(model, context) if quantized else model


def rows_of(count, tokens, vocabulary):
    drawn = random.Random(0)
    rows = []
    for _ in range(count):
        ids = [drawn.randrange(10, vocabulary) for _ in range(tokens)]
        rows.append({"input_ids": ids, "labels": [-100] * (tokens // 3) + ids[tokens // 3 :]})
    return rows


class Arm:
    """A method at work, by lean forwards or by PEFT's."""

    def __init__(self, method, shape, directory):
        import torch

        import tunekit as tk
        from tunekit.core.training.rows_loss import RowsLoss

        quantized = method.startswith("QLoRA")
        context = tk.Context(model_id="benchmark", dtype="float32", total_steps=10**6)
        self.adapter = adapter_of(method)
        self.model = self.adapter.attach(base_of(shape, quantized, directory), context).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        ways = {"model": self.model, "pad_id": 0, "device": "cpu", "padding_free": True, "chunked": True}
        self.ways = {way: RowsLoss(**ways, lean=way == "lean") for way in WAYS}
        self.entered = ExitStack()
        self.keeps = method != "QLoRA, nothing kept"

    def start(self, way):
        """Have the model compute this way, as it does for a whole run."""
        from tunekit.core.lean import forwards

        share, forwards.SHARE = forwards.SHARE, forwards.SHARE if self.keeps else 0.0
        self.entered.enter_context(self.ways[way].training())
        forwards.SHARE = share
        self.way = way

    def step(self, rows):
        """One step; its loss and seconds."""
        began = time.perf_counter()
        loss = self.ways[self.way](self.model, rows)
        extra = self.adapter.extra_loss(self.model)
        (loss if extra is None else loss + extra).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach()), time.perf_counter() - began


def measure(shape, rows, tokens, steps, methods=METHODS):
    """Seconds of every step by method and way; each method's first loss is checked to be the same both ways."""
    import tempfile

    data = rows_of(rows, tokens, SHAPES[shape]["vocab_size"])
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        arms = {}
        for method in methods:
            for way in WAYS:
                arms[method, way] = Arm(method, shape, directory)
                arms[method, way].start(way)
                stack.callback(arms[method, way].entered.close)
            first = [arms[method, way].step(data)[0] for way in WAYS]  # warms up, too
            assert abs(first[0] - first[1]) < 1e-5 * abs(first[1]), f"{method}: {first}"
        seconds = {arm: [] for arm in arms}
        for _ in range(steps):
            for arm, at_work in arms.items():
                seconds[arm].append(at_work.step(data)[1])
    return seconds


def ratios(seconds):
    """The median over rounds of each arm's seconds divided by those of LoRA the same way, and by PEFT's own."""
    found = {}
    for (method, way), times in seconds.items():
        lora = seconds["LoRA", way]
        theirs = seconds[method, "PEFT"]
        found.setdefault(method, {})[way] = {
            "seconds": statistics.median(times),
            "to LoRA": statistics.median(mine / other for mine, other in zip(times, lora, strict=True)),
            "to PEFT": statistics.median(mine / other for mine, other in zip(times, theirs, strict=True)),
        }
    return found


def main(arguments=None):
    """Measure, print a table, and write it where it is asked for; returns the ratios."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=180, help="in a row")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    methods = tuple(dict.fromkeys(["LoRA", *options.methods]))
    found = ratios(measure(options.shape, options.rows, options.tokens, options.steps, methods))
    print(f"{'method':22} {'lean s':>8} {'PEFT s':>8} {'lean/LoRA':>10} {'PEFT/LoRA':>10} {'lean/PEFT':>10}")
    for method, ways in found.items():
        lean, theirs = ways["lean"], ways["PEFT"]
        print(
            f"{method:22} {lean['seconds']:8.3f} {theirs['seconds']:8.3f} {lean['to LoRA']:10.2f} "
            f"{theirs['to LoRA']:10.2f} {lean['to PEFT']:10.2f}"
        )
    if options.out:
        machine = {"processor": platform.processor(), "cores": os.cpu_count(), "torch": torch.__version__}
        content = {"options": vars(options) | {"out": str(options.out)}, "machine": machine, "methods": found}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
