"""Compare six methods on the same rows: `python examples/compare_methods.py`, or with your own model and data:

python examples/compare_methods.py --model HuggingFaceTB/SmolLM2-135M --data train.jsonl --steps 500 --rates 1e-4 1e-3

Called again with the same arguments, it goes on where it was stopped.
"""

import argparse
import importlib.util

import attrs

import tunekit as tk

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=tk.TINY, help="a Hub id or a directory; default: the embedded model")
parser.add_argument("--data", default=tk.ORDERS, help="a file of JSON Lines; default: the embedded data")
parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run")
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each arm is run with each")
parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 1e-2], help="tried with each method")
parser.add_argument("--directory", default="runs/compare", help="of the comparison")
options = parser.parse_args()

pipeline = tk.Pipeline(
    model=options.model,
    data=tk.JsonLines(path=options.data),
    validation=0.15,
    trainer=tk.SFT(batch_size=8),
    evaluators=(tk.Perplexity(), tk.TokenAccuracy()),
)
# A share would hold out other rows with each seed. The same for all: what is left to chance is the training alone.
train, held_out = pipeline.rows()
pipeline = attrs.evolve(pipeline, data=tk.InMemory(rows=train), validation=tk.InMemory(rows=held_out))

methods = [tk.LoRA(), tk.AdaLoRA(), tk.IA3(), tk.LoHa(), tk.LoKr()]
if importlib.util.find_spec("bitsandbytes"):
    methods.append(tk.QLoRA())  # LoRA over a base in four bits, which is measured by itself
else:
    print("QLoRA is left out: pip install bitsandbytes")

comparison = tk.compare(
    pipeline,
    adapters=methods,
    directory=options.directory,
    budget=tk.Steps(options.steps),
    seeds=options.seeds,
    learning_rates=options.rates,
)
print(comparison)
best = comparison.best("perplexity")
print(f"\nthe best by perplexity: {best.name}; its first run is in {comparison.run(best).directory}")
if importlib.util.find_spec("matplotlib"):
    comparison.plot("perplexity", "trainable_parameters").savefig(f"{options.directory}/front.png")
