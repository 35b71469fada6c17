"""Classify what patients write, by generation: `python examples/sentiment.py`, or with your own texts and labels:

python examples/sentiment.py --model HuggingFaceTB/SmolLM2-135M --data comments.tsv

A line of the file is a text, a tab, and 0 (negative) or 1 (positive). Without it, comments are put together from parts.
Accuracy alone says little: beside it stand the majority baseline and macro-F1, with its interval in the report.
"""

import argparse
import itertools

import tunekit as tk

GOOD = ("was kind", "explained everything", "took the time I needed", "was gentle and quick", "called back at once")
BAD = ("was rude", "explained nothing", "kept me waiting for hours", "was rough and slow", "never called back")
WHO = (
    "The nurse",
    "My doctor",
    "The dentist",
    "The surgeon",
    "The ward",
    "Reception",
    "The pharmacy",
    "The new clinic",
)
WHEN = ("", "today ", "after the operation ", "this spring ", "as always ")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=tk.TINY, help="a Hub id or a directory; default: the embedded model")
parser.add_argument("--data", nargs="*", default=[], help="files of lines: a text, a tab, 0 or 1")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--learning-rate", type=float, default=2e-3)
parser.add_argument("--shots", type=int, help="also measure the base with so many training rows in its prompt")
parser.add_argument("--run", default="runs/sentiment", help="the run directory")
options = parser.parse_args()

if options.data:
    columns = {"header": ("text", "label"), "quote": "", "format": "tsv", "on_error": "skip"}
    data = tk.Table(path=options.data, labels=("negative", "positive"), **columns)
else:
    parts = itertools.product(WHO, WHEN, [(text, "positive") for text in GOOD] + [(text, "negative") for text in BAD])
    data = tk.InMemory(rows=[{"text": f"{who} {when}{text}.", "label": label} for who, when, (text, label) in parts])

pipeline = tk.Pipeline(
    model=options.model,
    data=data,
    validation=0.2,
    adapter=tk.Full(),
    trainer=tk.SFT(epochs=options.epochs, batch_size=16, learning_rate=options.learning_rate, on_long="drop"),
    evaluators=(tk.Classification(method="generation", max_new_tokens=16), tk.Perplexity()),
    baselines=() if options.shots is None else (tk.Prompted(shots=options.shots),),
)
run = pipeline.run(options.run)
print(run)
print(f"\nClasses, confusion and intervals are in {options.run}/report.html")
