"""Teach a model the language of a book: `python examples/domain_text.py`, or with a book and a model of your own:

python examples/domain_text.py --model HuggingFaceTB/SmolLM2-135M --book book.txt --max-length 512

Every token of the text is learned. `Retention` watches what that costs of what the model could do before: it measures
general texts, here the embedded customer messages, before and after.
"""

import argparse
from pathlib import Path

import tunekit as tk

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=tk.TINY, help="a Hub id or a directory; default: the embedded model")
parser.add_argument("--book", default=Path(__file__).parent / "data/cricket.txt", help="paragraphs, with lines between")
parser.add_argument("--max-length", type=int, default=128, help="tokens; longer paragraphs are split into windows")
parser.add_argument("--epochs", type=float, default=8)
parser.add_argument("--run", default="runs/domain-text", help="the run directory")
options = parser.parse_args()

pipeline = tk.Pipeline(
    model=options.model,
    data=tk.TextFiles(path=options.book, separator=""),
    validation=0.2,
    adapter=tk.LoRA(rank=8),
    trainer=tk.SFT(
        epochs=options.epochs, batch_size=4, learning_rate=2e-3, max_length=options.max_length, on_long="split"
    ),
    evaluators=(tk.Perplexity(), tk.Retention(source=tk.JsonLines(path=tk.ORDERS), max_rows=40)),
)
run = pipeline.run(options.run)
print(run)
print(run.generate("The bowler", max_new_tokens=24))
