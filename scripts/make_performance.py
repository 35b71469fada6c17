"""Write docs/performance.md from benchmarks/results/*.json: `python scripts/make_performance.py`.

With `--check`, fail if the page is stale. Plots are written beside it, into docs/images; figures and words of the page
come from the files alone, and `remarks.json` among them says in words why a goal was not reached.
"""

import json
import sys
from pathlib import Path

from performance_goals import goals
from performance_tables import ablation, about, comparison, methods, records, scaling

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"
MADE = "<!-- Written by scripts/make_performance.py from benchmarks/results. Measure again instead of changing it. -->"
INTRODUCTION = """\
How fast tunekit trains and how much memory it takes, beside TRL and plain `transformers.Trainer` with PEFT; and how it
was measured. Every figure is from a file in `benchmarks/results`, where the single runs are too.

All arms have the same model, rows, order, masks, initial adapter, optimizer and rows a step, and run in processes of
their own, in turn, round after round. After the first round an arm must have learned from as many tokens as plain
transformers in float32, with the same first loss (within 1e-5 of it, 1e-3 where the arithmetic is bfloat16), the same
first gradient (a cosine above 0.999) and the same loss on held-out rows after its last step (within 0.5 %, by one
script that uses transformers and PEFT alone); otherwise it is not compared. Tokens are real ones: padding counts for
nobody. The first step of a run is not measured. Brackets hold 95 % bootstrap intervals over rounds. MFU is the
arithmetic that LoRA needs, without padding and recomputation, over the fastest matrix product of the same machine in
the same minutes, on the shapes of the model and in the dtype that the arm computes in. All arms are given rows that
are tokenized already: what TRL takes to tokenize them is not counted.

`make bench` makes an environment with the peers and measures all of it anew."""
COMPARISONS = {
    "speed": "The 135M shape",
    "speed-avx512-bf16": "The 135M shape on a processor with AVX512-BF16, in both dtypes",
    "speed-0.5b": "The 0.5B shape, vocabulary of 152k",
    "speed-0.5b-full": "The 0.5B shape, a step of 2,000 tokens",
    "stories260k": "A very small model: stories260k",
    "scaling-least": "Where tunekit gains least: no padding, loss on every token",
}
TABLES = {
    "memory": ("Memory, planned and measured", records),
    "methods": ("Adapter methods beside LoRA, the 135M shape", methods),
    "methods-3b": ("Adapter methods beside LoRA, two layers of a 3B shape", methods),
}


MEASURED = {
    "real_tokens_per_second": "real tokens per second",
    "cold": "seconds, with empty caches",
    "seconds": "seconds from start to end",
}
"""What a plot over a quantity shows: the first of these that its points have."""


def read(folder=RESULTS):
    """Every result by the name of its file."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def page(results):
    """The page as text."""
    parts = [MADE, "# Performance", INTRODUCTION, "## Goals and what was reached", goals(results)]
    for name, title in COMPARISONS.items():
        if name in results:
            drawn = f"![real tokens a second by arm](images/{name}.svg)"
            parts += [f"## {title}", about(results[name]), drawn, comparison(results[name])]
    if "levers" in results:
        parts += ["## Lever by lever", about(results["levers"]), ablation(results["levers"])]
    for name, (title, made) in TABLES.items():
        if name in results:
            parts += [f"## {title}", made(results[name])]
    growing = {name: found for name, found in results.items() if "quantity" in found}
    if growing:
        parts.append("## How speed changes with the work")
    for name, found in growing.items():
        parts += [f"### By {found['title']}", f"![{found['title']}](images/{name}.svg)", scaling(found)]
    return "\n\n".join(parts) + "\n"


def plot(name, found):
    """A figure of a result as `docs/images/<name>.svg`: bars by arm, or lines over the points of a quantity."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    (lines if "quantity" in found else bars)(axes, found)
    IMAGES.mkdir(exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


def bars(axes, found):
    """Real tokens a second of each arm."""
    arms = found["arms"]
    rates = [arm["real_tokens_per_second"] for arm in arms.values()]
    colors = ["C0" if name == "tunekit" else "C7" for name in arms]
    axes.barh(list(arms), rates, color=colors)
    axes.invert_yaxis()
    axes.set_xlabel("real tokens per second")


def lines(axes, found):
    """One line an arm over the points of a quantity."""
    axes.set_xlabel(found["title"])
    axes.set_xscale("log")
    first = next(iter(found["points"][0]["arms"].values()))
    value = next(name for name in MEASURED if name in first)
    axes.set_ylabel(MEASURED[value])
    for arm in dict.fromkeys(arm for point in found["points"] for arm in point["arms"]):
        points = [(point["at"], point["arms"][arm][value]) for point in found["points"] if arm in point["arms"]]
        axes.plot(*zip(*points, strict=True), marker="o", label=arm)
    ats = [point["at"] for point in found["points"]]
    axes.set_xticks(ats, [f"{at:,}" for at in ats])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    axes.legend()


def main(arguments):
    results = read()
    made = page(results)
    if "--check" in arguments:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made:
            raise SystemExit("docs/performance.md is stale: run scripts/make_performance.py")
        return
    PAGE.write_text(made, encoding="utf-8")
    for name, found in results.items():
        if "quantity" in found or name in COMPARISONS:
            plot(name, found)


if __name__ == "__main__":
    main(sys.argv[1:])
