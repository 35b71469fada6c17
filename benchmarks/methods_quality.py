"""How good the methods are at an equal number of steps, beside the order that PEFT's own comparison finds.

    python benchmarks/methods_quality.py --model ../shared/models/stories260k \\
        --text ../shared/data/tinyshakespeare/input.txt

A model of 260 thousand parameters that knows children's stories learns to go on in Shakespeare's plays. Each method has
its own default learning rate, which was chosen for models ten thousand times as large; with `--rates`, each is also
given the same few rates, and the best of them counts. PEFT's figures are test accuracies on GSM8K of Llama-3.2-3B
trained on MetaMathQA (huggingface/peft, method_comparison/MetaMathQA/results). Called again, it goes on where it was
stopped.
"""

import argparse
import json
import platform
from itertools import combinations
from pathlib import Path

import tunekit as tk
from tunekit.core.common.assets import resolve

METHODS = {
    "LoRA": tk.LoRA(),
    "rsLoRA": tk.LoRA(variant="rslora"),
    "DoRA": tk.LoRA(variant="dora"),
    "AdaLoRA": tk.AdaLoRA(),
    "IA3": tk.IA3(),
    "LoHa": tk.LoHa(),
    "LoKr": tk.LoKr(),
    "Full": tk.Full(),
}
PEFT = {
    "LoRA": 0.478,
    "rsLoRA": 0.513,
    "DoRA": 0.469,
    "AdaLoRA": 0.373,
    "IA3": 0.398,
    "LoHa": 0.393,
    "LoKr": 0.466,
    "Full": 0.472,
}
METRIC = "bits_per_byte"
PIECE = 200
"""Characters of a row."""


def rows(text, count):
    """`count` pieces of the text at equal distances, each from the beginning of a line."""
    starts = [text.index("\n", at * (len(text) - 2 * PIECE) // count) + 1 for at in range(count)]
    return [{"text": text[start : start + PIECE]} for start in starts]


def figures(comparison, names):
    """Mean and interval of each method; with several rates those of the best, by its mean."""
    found = {}
    for at, name in enumerate(names):
        rates = len(comparison.arms) // len(names)
        arms = [arm for arm in comparison.arms[at * rates : (at + 1) * rates] if arm.finished]
        best = min(arms, key=lambda arm: arm.mean(METRIC)[0])
        mean, half = best.mean(METRIC)
        found[name] = {
            METRIC: mean,
            "interval": half,
            "token_accuracy": best.mean("token_accuracy")[0],
            "learning_rate": best.learning_rate,
            "trainable_parameters": best.mean("trainable_parameters")[0],
            "seconds": best.mean("seconds")[0],
        }
    return found


def agreement(found):
    """Of all pairs, those in PEFT's order; and those of which the intervals do not overlap here."""
    pairs, same, clear = list(combinations(found, 2)), [], []
    for one, other in pairs:
        gap = found[one][METRIC] - found[other][METRIC]
        agrees = (gap < 0) == (PEFT[one] > PEFT[other])
        same += [agrees]
        halves = [found[name]["interval"] for name in (one, other)]
        if None not in halves and abs(gap) > sum(halves):
            clear += [agrees]
    return {"pairs": len(same), "as_peft": sum(same), "clear_pairs": len(clear), "clear_as_peft": sum(clear)}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=tk.TINY)
    parser.add_argument("--text", help="a text file; default: the embedded data")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="tried with each method besides")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--directory", default="runs/methods-quality")
    parser.add_argument("--output", help="where the figures go, as JSON")
    options = parser.parse_args(arguments)

    text = Path(options.text or resolve(tk.ORDERS)).read_text(encoding="utf-8")
    pieces = rows(text, options.rows)
    pipeline = tk.Pipeline(
        model=options.model,
        data=tk.InMemory(rows=[piece for at, piece in enumerate(pieces) if at % 5]),
        validation=tk.InMemory(rows=pieces[::5]),
        trainer=tk.SFT(batch_size=4, on_long="truncate"),
        evaluators=(tk.Perplexity(), tk.TokenAccuracy()),
    )
    methods = [METHODS[name] for name in options.methods]
    same = {"adapters": methods, "budget": tk.Steps(options.steps)}
    parts = {}
    ways = {"own rates": None, **({"best of the rates": options.rates} if options.rates else {})}
    for name, rates in ways.items():
        place = Path(options.directory) / name.replace(" ", "-")
        comparison = tk.compare(pipeline, **same, seeds=options.seeds, learning_rates=rates, directory=place)
        print(comparison, flush=True)
        found = figures(comparison, options.methods)
        parts[name] = {"methods": found, **agreement(found), "base": comparison.rows[0][f"base_{METRIC}"]}
    described = {name: getattr(options, name) for name in ("rows", "steps", "seeds", "rates")}
    machine = {"platform": platform.platform(), "python": platform.python_version()}
    result = {**described, "model": Path(options.model).name, "machine": machine, "peft": PEFT, **parts}
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
