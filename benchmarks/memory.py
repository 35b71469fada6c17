"""The peak memory of training that the plan predicts, beside the one that torch's allocator reports.

    python benchmarks/memory.py                            # the table, in a process each; a CUDA device if there is one
    python benchmarks/memory.py --json benchmarks/results/memory.json
    python benchmarks/memory.py --cases LoRA --size small  # a quick look

On the CPU the measured peak is that of torch's profiler, from the allocator's own events, and `resident` is what the
operating system says the process grew by: other libraries, the code itself and freed pages among it. On CUDA it is
`max_memory_allocated`. Models have random weights, which need the same memory as any others.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = {
    "small": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 2048},
    "medium": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 8192},
    "large vocabulary": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "vocab_size": 32000},
}
CASES = {
    "LoRA": ("LoRA", {}, {}),
    "LoRA, dropout": ("LoRA", {"dropout": 0.1}, {}),
    "LoRA, recomputed": ("LoRA", {}, {"gradient_checkpointing": True}),
    "LoRA, padded": ("LoRA", {}, {"padding_free": False, "chunked_loss": False}),
    "IA3": ("IA3", {}, {}),
    "LoHa": ("LoHa", {}, {}),
    "QLoRA": ("QLoRA", {}, {}),
    "Full": ("Full", {}, {}),
    "Full, two rows at once": ("Full", {}, {"micro_batch_size": 2}),
}
LENGTHS = (32, 160)


def rows(length, count=16):
    """As many rows as two steps take, of many lengths around this one."""
    numbers = random.Random(0)
    words = ["number", "answer", "the", "is", "seven", "of"]

    def text():
        return " ".join(numbers.choice(words) for _ in range(int(length * (0.5 + numbers.random()) / 4)))

    return [{"prompt": text(), "completion": text()} for _ in range(count)]


def one(size, case, length):
    """Predicted and measured bytes of one case, in this process."""
    import psutil
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    import tunekit as tk
    from tunekit.core.common.assets import resolve

    method, fields, training = CASES[case]
    cuda = torch.cuda.is_available()
    config = LlamaConfig(**SIZES[size], num_attention_heads=4, eos_token_id=2, pad_token_id=3)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(place / "model")
        AutoTokenizer.from_pretrained(resolve(tk.TINY)).save_pretrained(place / "model")
        pipeline = tk.Pipeline(
            model=place / "model",
            data=tk.InMemory(rows=rows(length)),
            validation=0,
            adapter=getattr(tk, method)(**fields),
            trainer=tk.SFT(max_steps=4, batch_size=8, save_every=99, **training),
            dtype="float32",
        )
        predicted = sum(pipeline.plan().memory.values())
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            pipeline.run(place / "run")
            return {"predicted": predicted, "measured": torch.cuda.max_memory_allocated(), "resident": None}
        before = psutil.Process().memory_info().rss
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as report:
            pipeline.run(place / "run")
        import resource

        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        now = most = 0
        for event in report.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return {"predicted": predicted, "measured": most, "resident": grown}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--size", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--one", action="store_true", help="the first case alone, in this process, as JSON")
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(one(options.size[0], options.cases[0], options.lengths[0])))
        return []
    import torch

    found = []
    for size in options.size:
        for case in options.cases:
            for length in options.lengths:
                command = [sys.executable, __file__, "--one", "--size", size, "--cases", case, "--lengths", str(length)]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                figures = json.loads(said.splitlines()[-1])
                ratio = figures["predicted"] / figures["measured"]
                found.append({"size": size, "case": case, "length": length, **figures, "ratio": ratio})
                shown = [f"{figures[name] / 2**20:8.1f}" for name in ("predicted", "measured")]
                print(f"{size:18} {case:24} {length:5} {shown[0]} {shown[1]} MiB  {ratio:.3f}", flush=True)
    worst = max(found, key=lambda row: abs(row["ratio"] - 1))
    print(f"farthest off: {worst['case']}, {worst['size']}, {worst['length']}: {worst['ratio']:.3f}")
    if options.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        machine = {"device": device, "processor": platform.machine(), "system": platform.system()}
        machine |= {"python": platform.python_version(), "torch": torch.__version__}
        options.json.parent.mkdir(exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine, "rows": found}, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
