"""From runs to figures: medians, spreads, ratios with intervals, and the table of them."""

import statistics

from harness.arms import ARMS
from harness.rounds import ROOF

WARM_UP = 1
"""Steps at the start of a run that are not measured: allocators, caches and compilers work there."""


def figures(workload, steps, rounds, base="tunekit"):
    """What came of `rounds`, by arm.

    Args:
        workload: the work.
        steps: the rows of each of its steps.
        rounds: the `Rounds` that were made.
        base: the arm that ratios are of: its real tokens a second over the other's.
    """
    count = rounds.complete()
    runs = [run for run in rounds.runs if run["round"] < count]
    roof = {
        dtype: max(rate for run in runs if run["arm"] == ROOF for rate in run[dtype].values())
        for dtype in ("float32", "bfloat16")
    }
    passed = [name for name in rounds.names if name not in rounds.failed]
    arms = {name: _of_arm(name, [run for run in runs if run["arm"] == name], workload, steps, roof) for name in passed}
    if base in arms:
        for name in arms:
            arms[name]["ratio"] = _ratio(*(_rates(runs, one, steps) for one in (base, name)))
    return {"rounds": count, "roof_gflops": {k: round(v / 1e9, 2) for k, v in roof.items()}, "arms": arms}


def _of_arm(name, runs, workload, steps, roof):
    measured = [second for run in runs for second in run["seconds"][WARM_UP:]]
    kept = steps[WARM_UP:]
    real = sum(len(row["input_ids"]) for step in kept for row in step)
    learned = sum(runs[0]["supervised"][WARM_UP:])
    rates = _rates(runs, name, steps)
    rate = statistics.median(rates)
    work = sum(workload.flops(step) for step in kept) / real
    arm, first = ARMS[name], runs[0]
    return {
        "about": arm.about,
        "dtype": arm.dtype,
        "computes": arm.computes,
        "trained_dtype": first["trained_dtype"],
        "step_seconds": _spread(measured),
        "real_tokens_per_second": round(rate, 2),
        "supervised_tokens_per_second": round(rate * learned / real, 2),
        "peak_mib": round(statistics.median(run["peak_mib"] for run in runs)),
        "startup_seconds": _startup(runs),
        "seconds_to_last_loss": round(statistics.median(run["ends"][-1] for run in runs), 2),
        "mfu": round(work * rate / roof[arm.computes], 4),
        "first_loss": first["losses"][0],
        "last_loss": first["losses"][-1],
        "final_loss": first.get("final_loss"),
        "gradient_cosine": first.get("cosine"),
        "others_busy": round(statistics.median(run["others_busy"] for run in runs), 2),
    }


def _rates(runs, name, steps):
    """Real tokens a second of each run of an arm, after the warm-up."""
    real = sum(len(row["input_ids"]) for step in steps[WARM_UP:] for row in step)
    return [real / sum(run["seconds"][WARM_UP:]) for run in runs if run["arm"] == name]


def _spread(values):
    ordered = sorted(values)

    def at(share):
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)

    return {"median": round(statistics.median(ordered), 3), "p10": at(0.1), "p90": at(0.9), "count": len(ordered)}


def _startup(runs):
    """Seconds of each part of the start-up, medians; "first step" ends when the optimizer has taken it."""
    found, before = {}, 0.0
    for part in [*runs[0]["startup"], "first step"]:
        now = statistics.median(run["startup"].get(part, run["ends"][0]) for run in runs)
        found[part], before = round(now - before, 2), now
    return {**found, "total": round(before, 2)}


def _ratio(ours, theirs):
    """The ratio of two medians, and where it would lie with other rounds; None for the interval of a single round."""
    from tunekit.core.evaluation.statistics import bootstrap

    def of(draw):
        return statistics.median(ours[n] for n in draw) / statistics.median(theirs[n] for n in draw)

    count = min(len(ours), len(theirs))  # one of them may be run in the first round alone
    low, high = bootstrap(of, count) if count > 1 else (None, None)
    return {"value": of(range(count)), "low": low, "high": high}


def table(found):
    """The figures as lines of text."""
    speeds = f"{'s/step':>8} {'tok/s':>8} {'learned/s':>9}"
    lines = [f"{'arm':26} {'computes':9} {speeds} {'MiB':>7} {'start s':>8} {'MFU':>6} {'tunekit is':>20}"]
    for name, arm in found["arms"].items():
        ratio = arm.get("ratio")
        times = "" if not ratio else f"{ratio['value']:.2f}x"
        if ratio and ratio["low"]:
            times += f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        lines.append(
            f"{name:26} {arm['computes']:9} {arm['step_seconds']['median']:8.2f} {arm['real_tokens_per_second']:8.0f} "
            f"{arm['supervised_tokens_per_second']:9.0f} {arm['peak_mib']:7} {arm['startup_seconds']['total']:8.1f} "
            f"{arm['mfu']:6.3f} {times:>20}"
        )
    roofs = ", ".join(f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in found["roof_gflops"].items())
    return "\n".join([*lines, f"{found['rounds']} whole rounds; the machine's fastest product: {roofs}"])
