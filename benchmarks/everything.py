"""All that docs/performance.md is made of, the most important first, in the minutes there are.

    python benchmarks/everything.py --minutes 20        # make bench

Each stage writes a file of benchmarks/results as soon as it is done. Called again, it goes on: runs of the same sources
are kept, and what there was no time for is measured now. With `--trial` every stage is made once on tiny models, and
nothing of it is kept: is everything in place?
"""

import argparse
import shutil
import time
from pathlib import Path

import attrs
from harness import report
from harness.arms import REFERENCE, SETS
from harness.workload import Workload
from scaling import TITLES
from scaling import main as scale
from speed import measure, write

RESULTS = Path(__file__).parent / "results"
MAIN = Workload(shape="135m", rows_per_step=8, steps=4)
LEVERS = Workload(shape="135m", rows_per_step=4, steps=4)
LARGE = Workload(shape="0.5b", rows_per_step=8, steps=2)
FULL = Workload(shape="0.5b", rows_per_step=10, steps=2)
EVEN = Workload(shape="135m", rows_per_step=4, steps=3, data="drawn", length=200, supervised=1.0)
THREE = ("tunekit", REFERENCE, "trl")
STAGES = {
    # file: (work, arms, share of the minutes that are left)
    "speed": (MAIN, SETS["main"], 0.7),
    "speed-avx512-bf16": (MAIN, SETS["dtypes"], 0.7),
    "speed-0.5b": (LARGE, THREE, 0.5),
    "levers": (LEVERS, SETS["levers"], 0.6),
    "scaling-least": (EVEN, ("tunekit", REFERENCE, "trl-tuned-float32"), 0.5),
    "speed-0.5b-full": (FULL, ("tunekit", REFERENCE), 0.8),
    "stories260k": (Workload(shape="stories260k", steps=30), (*THREE, "trl-tuned-float32"), 0.8),
}
"""`speed-avx512-bf16` is `speed` for a processor that has these instructions. Some have fewer rows a step than a
user's 8, where that would take hours: peers are slow.
"""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20, help="after them no round, stage or quantity begins")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of a stage at most")
    parser.add_argument("--threads", type=int, help="of each process; all cores without it")
    parser.add_argument("--only", help="names of stages and quantities to measure, joined by commas")
    parser.add_argument("--trial", action="store_true", help="every stage once on tiny models, into build/benchmarks")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    wanted = options.only.split(",") if options.only else [*STAGES, *TITLES]
    limits = {"repeats": 1 if options.trial else options.repeats, "threads": options.threads}
    out = RESULTS.parents[1] / "build" / "benchmarks" / "trial" if options.trial else RESULTS
    for name, (work, arms, share) in ((name, STAGES[name]) for name in STAGES if name in wanted):
        left = (end - time.monotonic()) / 60
        if left <= 0:
            print(f"{name}: no time left; call it again")
            continue
        used = attrs.evolve(work, shape="tiny", steps=2) if options.trial else work
        print(f"\n{name}: {', '.join(arms)}", flush=True)
        try:
            found = measure(used, arms, minutes=share * left, **limits)
        except SystemExit as stop:  # one stage that cannot be made is no reason to make none
            print(f"{name}: {stop}")
            continue
        print(report.table(found))
        write(found, out / f"{name}.json")
    for quantity in (name for name in TITLES if name in wanted):
        left = (end - time.monotonic()) / 60
        if left <= 0:
            print(f"scaling by {quantity}: no time left; call it again")
            continue
        file = out / f"scaling-{quantity}.json"
        asked = {"--minutes": left / 3, "--repeats": min(3, limits["repeats"]), "--out": file}
        if options.trial:
            asked |= {"--shape": "tiny", "--steps": 2}
        scale([quantity, *(str(part) for pair in asked.items() for part in pair)])
    if options.trial:
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
