"""Fine-tune over a base in four bits: `python examples/qlora.py`, or with your own model and data.

The base is stored as NF4 and stays as it is; a LoRA adapter is trained on top, in full precision. Exporting merges the
adapter into the dequantized weights, which are those it was trained on, and leaves a plain model.
"""

import argparse

import tunekit as tk

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=tk.TINY, help="a Hub id or a directory; default: the embedded model")
parser.add_argument("--data", default=tk.ORDERS, help="a file of JSON Lines; default: the embedded data")
parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
parser.add_argument("--run", default="runs/qlora", help="the run directory")
parser.add_argument("--export", default="runs/qlora-merged", help="where the merged model goes")
options = parser.parse_args()

pipeline = tk.Pipeline(
    model=options.model,
    data=tk.JsonLines(path=options.data),
    adapter=tk.QLoRA(rank=16),
    trainer=tk.SFT(max_steps=options.steps, batch_size=8, learning_rate=3e-3),
    evaluators=(tk.Perplexity(), tk.TokenAccuracy()),
)
print(pipeline.plan(), end="\n\n")
run = pipeline.run(options.run)
print(run)
run.export(options.export)
print(f"\nA plain model, with the training in its weights, is in {options.export}")
