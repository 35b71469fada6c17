"""How fast tunekit trains beside TRL and plain transformers with PEFT: same model, rows, masks, adapter and optimizer.

    python benchmarks/speed.py --minutes 20 --out benchmarks/results/speed.json       # or: make bench
    python benchmarks/speed.py --arms levers --out benchmarks/results/levers.json     # lever by lever
    python benchmarks/speed.py --shape small --arms two --steps 2 --minutes 1         # is everything in place?

Arms run in processes of their own, in turn, round after round, so that what else the machine does falls on all of them.
After the first round stands a gate: arms with another loss, gradient, number of supervised tokens or result are not
compared. Called again with the same arguments it goes on where it stopped; `--fresh` begins anew.
"""

import argparse
import datetime
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import attrs
from harness import report
from harness.arms import ARMS, SETS
from harness.clock import machine
from harness.rounds import Rounds
from harness.workload import SHAPES, Workload, prepare, steps_of

ROOT = Path(__file__).parents[1]


def measure(workload, names, *, minutes, repeats=5, threads=None, fresh=False, most_seconds=900):
    """Make rounds of the arms on a workload; everything that came of it, as plain values."""
    key = hashlib.sha256(json.dumps([attrs.asdict(workload), sources()]).encode()).hexdigest()[:12]
    work = ROOT / "build" / "benchmarks" / f"{workload.shape}-{key}"
    if fresh:
        shutil.rmtree(work, ignore_errors=True)
    threads = threads or os.cpu_count()
    described = machine(threads)
    prepare(workload, work)
    rounds = Rounds(work, names, threads=threads, minutes=minutes, most_seconds=most_seconds, repeats=repeats)
    rounds.make()
    steps = steps_of(workload, work)
    return {
        "workload": {**attrs.asdict(workload), "reduced": workload.reduced, **counted(steps)},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": described,
        **report.figures(workload, steps, rounds, "tunekit" if "tunekit" in names else "tunekit-levers-off"),
        "failed": rounds.failed,
        "runs": rounds.runs,
    }


def counted(steps):
    """What is in the measured steps: tokens, how many carry loss, and how many a padded step has more."""
    rows = [row for step in steps for row in step]
    lengths = [len(row["input_ids"]) for row in rows]
    padded = sum(len(step) * max(len(row["input_ids"]) for row in step) for step in steps)
    learned = sum(label != -100 for row in rows for label in row["labels"][1:])
    return {
        "tokens_per_step": round(sum(lengths) / len(steps)),
        "supervised_share": round(learned / sum(lengths), 3),
        "padded_per_real_token": round(padded / sum(lengths), 3),
        "longest": max(lengths),
    }


def sources():
    """A hash of what is measured and of what measures it: runs of other sources are not gone on with."""
    files = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def commit():
    """The revision measured, with a mark where its sources were changed since."""
    said, changed = (
        subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "src"])
    )
    return f"{said or 'unknown'}{'-changed' if changed else ''}"


def write(found, out):
    """The result as a file whose runs stand one on a line."""
    runs = ",\n  ".join(json.dumps(run) for run in found["runs"])
    rest = json.dumps({**found, "runs": []}, indent=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(rest.replace('"runs": []', f'"runs": [\n  {runs}\n ]') + "\n")


def parser():
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--shape", choices=SHAPES, default="135m")
    made.add_argument("--layers", type=int, help="keep only so many layers of the shape")
    made.add_argument("--rows-per-step", type=int, default=8)
    made.add_argument("--steps", type=int, default=3, help="of one run; the first is not measured")
    made.add_argument("--arms", default="main", help=f"{', '.join(SETS)}, or names joined by commas")
    made.add_argument("--repeats", type=int, default=5, help="rounds at most")
    made.add_argument("--minutes", type=float, default=20, help="no round begins that would not be done by then")
    made.add_argument("--most-seconds", type=float, default=900, help="after them a run is stopped, and its arm fails")
    made.add_argument("--threads", type=int, help="of each process; all cores without it")
    made.add_argument("--fresh", action="store_true", help="begin anew instead of going on")
    made.add_argument("--out", type=Path)
    return made


def main(arguments=None):
    options = parser().parse_args(arguments)
    names = SETS.get(options.arms) or options.arms.split(",")
    if unknown := [name for name in names if name not in ARMS]:
        raise SystemExit(f"no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    workload = Workload(
        shape=options.shape, layers=options.layers, rows_per_step=options.rows_per_step, steps=options.steps
    )
    passed = {name: getattr(options, name) for name in ("minutes", "repeats", "threads", "fresh", "most_seconds")}
    found = measure(workload, names, **passed)
    print(report.table(found))
    for name, reason in found["failed"].items():
        print(f"{name}: {reason}")
    if options.out:
        write(found, options.out)


if __name__ == "__main__":
    main()
