"""Train on more rows than fit into memory: `python examples/streaming.py`, or with your own files:

python examples/streaming.py --model HuggingFaceTB/SmolLM2-135M --data "shards/*.jsonl.gz"

There is no switch for streaming. Sources are read row by row, and encoded rows are kept in files that are read through
memory mapping: shuffling, counting, holding out and resuming are exact however many rows there are.
"""

import argparse
import gzip
import json
from pathlib import Path

import tunekit as tk

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=tk.TINY, help="a Hub id or a directory; default: the embedded model")
parser.add_argument("--data", help="files or a pattern; default: rows that are made up, in four compressed shards")
parser.add_argument("--rows", type=int, default=4000, help="how many rows are made up")
parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
parser.add_argument("--run", default="runs/streaming", help="the run directory")
options = parser.parse_args()

if not options.data:
    shards = Path(f"{options.run}-shards")
    shards.mkdir(parents=True, exist_ok=True)
    for shard in range(4):
        with gzip.open(shards / f"{shard}.jsonl.gz", "wt", encoding="utf-8") as file:
            for n in range(shard, options.rows, 4):
                file.write(json.dumps({"prompt": f"What is {n} + 1?", "completion": str(n + 1)}) + "\n")
    options.data = f"{shards}/*.jsonl.gz"

pipeline = tk.Pipeline(
    model=options.model,
    data=tk.JsonLines(path=options.data),
    validation=0.01,
    trainer=tk.SFT(max_steps=options.steps, batch_size=16, learning_rate=1e-3),
)
print(pipeline.plan(), end="\n\n")  # the exact number of rows, tokens and steps, before anything is trained
print(pipeline.run(options.run))
print(f"\n{tk.cache_info()}")
