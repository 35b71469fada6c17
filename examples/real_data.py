"""A real pretrained model on real data: stories260k learns 400 rows of GSM8K with LoRA on the CPU.

python examples/real_data.py --shared ../shared --run runs/real
"""

import argparse
import itertools
import json
from pathlib import Path

import tunekit as tk

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--shared", type=Path, default=Path("../shared"), help="holds models/stories260k and data/gsm8k")
parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
parser.add_argument("--run", type=Path, default=Path("runs/real"), help="the run directory")
options = parser.parse_args()

with (options.shared / "data/gsm8k/train.jsonl").open(encoding="utf-8") as file:
    rows = [json.loads(line) for line in itertools.islice(file, 400)]

pipeline = tk.Pipeline(
    model=options.shared / "models/stories260k",
    data=tk.InMemory(rows=rows),  # question and answer are recognised
    adapter=tk.LoRA(rank=8),  # every linear layer
    trainer=tk.SFT(max_steps=options.steps, batch_size=4, learning_rate=1e-2, on_long="drop"),
    evaluators=(tk.Perplexity(), tk.TokenAccuracy()),
)
print(pipeline.plan(), end="\n\n")
run = pipeline.run(options.run)
print(f"\n{run}\n\nThe adapter is in {options.run / 'adapter'}; plain PEFT reads it too.")
