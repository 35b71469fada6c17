"""How the speed of tunekit and of plain transformers with PEFT changes with the work, one quantity at a time.

    python benchmarks/scaling.py length --out benchmarks/results/scaling-length.json
    python benchmarks/scaling.py all --minutes 3        # each quantity in its own file of benchmarks/results

Each quantity takes a few minutes on a small model; `least` is the work on which tunekit gains least: rows of one
length, so that nothing is padded, and loss on every token, so that no logits are spared.
"""

import argparse
from pathlib import Path

import attrs
from harness import report
from harness.arms import REFERENCE
from harness.preparation import adapters, rows
from harness.workload import SHAPES, Workload
from speed import commit, measure, write

RESULTS = Path(__file__).parent / "results"
TOKENS = 2048
"""Of a step in the workloads of one length."""


def workloads(shape, steps):
    """The points of each quantity, by the number on the horizontal axis."""
    usual = Workload(shape=shape, steps=steps, data="drawn")
    lengths = (64, 128, 256, 512, 1024)
    return {
        "length": {n: attrs.evolve(usual, length=n, rows_per_step=TOKENS // n, supervised=0.5) for n in lengths},
        "rank": {n: attrs.evolve(usual, rank=n) for n in (4, 16, 64, 128)},
        "batch": {n: attrs.evolve(usual, rows_per_step=n) for n in (1, 2, 8, 16)},
        "supervised": {n: attrs.evolve(usual, length=256, supervised=n) for n in (0.1, 0.3, 0.6, 1.0)},
        "vocabulary": {n: attrs.evolve(usual, vocabulary=n) for n in (32000, 152000)},
    }


TITLES = {
    "length": "tokens of a row, 2,048 tokens a step, half of them supervised",
    "rank": "rank of the adapter",
    "batch": "rows a step, of GSM8K's lengths",
    "supervised": "share of the tokens that carry loss, rows of 256 tokens",
    "vocabulary": "vocabulary",
    "rows": "rows to be tokenized and masked",
    "adapters": "adapters trained one after the other in one process",
}
SPECIAL = {"rows": rows, "adapters": adapters}
"""What is no matter of an optimizer step, and measured another way."""


def scale(quantity, names, shape, steps, **limits):
    """A measurement at every point of a quantity; what came of it by point, with one list of all runs."""
    points, last = [], {}
    every = workloads(shape, steps)[quantity]
    for at, workload in every.items():
        print(f"{quantity} {at}", flush=True)
        limits["minutes"] = limits["minutes_in_all"] / len(every)
        last = measure(workload, names, **{name: limits[name] for name in ("minutes", "repeats", "threads", "fresh")})
        print(report.table(last), flush=True)
        points.append({"at": at, **{key: last[key] for key in ("workload", "rounds", "roof_gflops", "arms", "failed")}})
    return {"quantity": quantity, "title": TITLES[quantity], "machine": last["machine"], "points": points}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quantity", choices=[*TITLES, "least", "all"])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--steps", type=int, default=5, help="of one run; the first is not measured")
    parser.add_argument("--arms", default=f"tunekit,{REFERENCE}", help="names joined by commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=3, help="for each quantity; one round is made in any case")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--out", type=Path, help="the file to write; for all, the directory")
    options = parser.parse_args(arguments)
    names = options.arms.split(",")
    limits = {name: getattr(options, name) for name in ("repeats", "threads", "fresh")}
    for quantity in [*TITLES, "least"] if options.quantity == "all" else [options.quantity]:
        out = (options.out or RESULTS) / f"scaling-{quantity}.json" if options.quantity == "all" else options.out
        if quantity == "least":
            workload = Workload(shape=options.shape, steps=options.steps, data="drawn", length=256, supervised=1.0)
            found = measure(workload, names, minutes=options.minutes, **limits)
            print(report.table(found))
        elif quantity in SPECIAL:
            found = {"quantity": quantity, "title": TITLES[quantity], **SPECIAL[quantity](options.shape)}
        else:
            found = scale(quantity, names, options.shape, options.steps, minutes_in_all=options.minutes, **limits)
        if out:
            write({"runs": [], "commit": commit(), **found}, out)


if __name__ == "__main__":
    main()
