"""Fine-tune with LoRA and see what changed: `python examples/quickstart.py`, or with your own model and data:

python examples/quickstart.py --model HuggingFaceTB/SmolLM2-135M --data train.jsonl
"""

import argparse
import time
from pathlib import Path

import tunekit as tk

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=tk.TINY, help="a Hub id or a directory; default: the embedded model")
parser.add_argument("--data", default=tk.ORDERS, help="a file of JSON Lines; default: the embedded data")
parser.add_argument("--run", default=f"runs/quickstart-{time.strftime('%Y%m%d-%H%M%S')}", help="the run directory")
options = parser.parse_args()

pipeline = tk.Pipeline(
    model=options.model,
    data=tk.JsonLines(path=options.data),
    validation=0.15,
    adapter=tk.LoRA(rank=16),
    trainer=tk.SFT(epochs=4, batch_size=8, learning_rate=3e-3) if options.model == tk.TINY else tk.SFT(epochs=3),
    evaluators=(tk.Perplexity(), tk.ExactMatch(max_new_tokens=64)),
)
print(f"\nWhat {options.run} will do\n")
print(pipeline.plan())

run = pipeline.run(options.run)
print("\nOn held-out rows, before and after\n")
print(run)

_, held_out = pipeline.rows()
for example in held_out[:2]:
    prompt = example["messages"][:-1] if "messages" in example else example["text"][:80]
    print(f"\nasked   {prompt[-1]['content'] if isinstance(prompt, list) else prompt}")
    print(f"base    {run.generate(prompt, max_new_tokens=64, tuned=False)}")
    print(f"tuned   {run.generate(prompt, max_new_tokens=64)}")

print(f"\nEverything is in {options.run}:")
for path in sorted(Path(options.run).iterdir()):
    print(f"  {path}")
