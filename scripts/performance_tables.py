"""The tables of docs/performance.md, each from one result."""


def about(found):
    """The work and the machine of a comparison, in sentences."""
    work, machine = found["workload"], found["machine"]
    size = f"{work['shape']}, LoRA of rank {work['rank']} on all linear layers, {work['rows_per_step']} rows a step"
    reduced = f" Reduced to fit the time: {', '.join(work['reduced'])}." if work["reduced"] else ""
    lacks = f", without {', '.join(machine['lacks'])}" if machine["lacks"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    roofs = " and ".join(f"{rate:,.0f} GFLOP/s in {dtype}" for dtype, rate in found["roof_gflops"].items())
    busy = max(arm["others_busy"] for arm in found["arms"].values())
    return (
        f"{size}; {work['tokens_per_step']} tokens a step, {work['supervised_share']:.0%} of them supervised, "
        f"{work['padded_per_real_token']:.2f} padded ones for each where rows are padded; {work['steps']} steps a run, "
        f"{found['rounds']} rounds.{reduced}\n\n"
        f"Measured on {found['date']} at {found['commit']}: {machine['processor']}, {machine['threads']} threads on "
        f"{machine['cores']} cores{lacks}; {machine['memory_gib']:.0f} GiB; Python {machine['python']}, {packages}. "
        f"Its fastest matrix product ran at {roofs}; a load of {machine['load'][0]} when it began, and meanwhile other "
        f"processes took {busy:.1f} cores or less."
    )


def comparison(found):
    """Arms side by side, and those that are not compared with the reason."""
    rows = [
        [
            f"{name}: {arm['about']}",
            dtypes(arm),
            seconds(arm["step_seconds"]),
            f"{arm['real_tokens_per_second']:,.0f}",
            f"{arm['supervised_tokens_per_second']:,.0f}",
            f"{arm['peak_mib']:,}",
            f"{arm['startup_seconds']['total']:.1f}",
            f"{arm['seconds_to_last_loss']:.1f}",
            f"{arm['mfu']:.0%}",
            times(arm.get("ratio")),
        ]
        for name, arm in found["arms"].items()
    ]
    columns = [
        "arm", "base, arithmetic", "seconds a step (p10 to p90)", "real tokens/s", "supervised tokens/s", "peak MiB",
        "start to first step, s", "start to the last loss, s", "MFU", "tunekit is so many times as fast",
    ]  # fmt: skip
    parts = [table(columns, rows), startup(found), parity(found)]
    return "\n\n".join(part for part in [*parts, failed(found)] if part)


def startup(found):
    """Where the time to the first step goes."""
    parts = list(dict.fromkeys(part for arm in found["arms"].values() for part in arm["startup_seconds"]))
    rows = [
        [name, *(f"{arm['startup_seconds'].get(part, 0):.1f}" for part in parts)] for name, arm in found["arms"].items()
    ]
    return "Seconds of the start-up (TRL loads and reads rows in one constructor):\n\n" + table(["arm", *parts], rows)


def parity(found):
    """What the gate compared."""
    rows = [
        [
            name,
            f"{arm['first_loss']:.6f}",
            f"{arm['gradient_cosine']:.6f}",
            f"{arm['last_loss']:.6f}",
            f"{arm['final_loss']:.6f}",
        ]
        for name, arm in found["arms"].items()
    ]
    columns = ["arm", "loss of the first step", "cosine of its gradient", "loss of the last step", "held-out loss"]
    return "That they do the same work:\n\n" + table(columns, rows)


def ablation(found):
    """One lever after the other, held against none."""
    off = found["arms"]["tunekit-levers-off"]
    rows = []
    for name, arm in found["arms"].items():
        if not name.startswith(("tunekit", "lever")):
            continue
        gain = arm["real_tokens_per_second"] / off["real_tokens_per_second"]
        memory = f"{arm['peak_mib']:,}"
        step = seconds(arm["step_seconds"])
        first = f"{arm['startup_seconds']['total']:.1f}"
        rows.append([arm["about"], dtypes(arm), step, f"{gain:.2f}", times(inverse(arm.get("ratio"))), memory, first])
    columns = [
        "levers",
        "base, arithmetic",
        "seconds a step (p10 to p90)",
        "speed, none = 1",
        "over rounds",
        "peak MiB",
        "start to first step, s",
    ]
    return "\n\n".join(part for part in [table(columns, rows), failed(found)] if part)


def scaling(found):
    """One quantity: a row for each of its points."""
    arms = list(dict.fromkeys(arm for point in found["points"] for arm in point["arms"]))
    speed = "real_tokens_per_second" in next(iter(found["points"][0]["arms"].values()))
    rows = []
    for point in found["points"]:
        row = [f"{point['at']:,}"]
        for name in arms:
            arm = point["arms"].get(name, {})
            shown = ("real_tokens_per_second", "peak_mib") if speed else ("cold", "warm", "seconds", "peak_mib")
            units = {"real_tokens_per_second": "tokens/s", "peak_mib": "MiB", "seconds": "s in all"}
            row.append(", ".join(f"{arm[key]:,.4g} {units.get(key, 's ' + key)}" for key in shown if key in arm))
        ratio = point["arms"].get(arms[-1], {}).get("ratio")
        rows.append([*row, times(ratio)] if speed else row)
    return table([found["title"], *arms, *(["tunekit is so many times as fast"] if speed else [])], rows)


def methods(found):
    """Time a step of each method over LoRA's, of `benchmarks/methods.py`."""
    rows = [
        [
            name,
            f"{ways['lean']['seconds']:.2f}",
            f"{ways['lean']['to LoRA']:.2f}",
            f"{ways['PEFT']['to LoRA']:.2f}",
            f"{ways['lean']['to PEFT']:.2f}",
        ]
        for name, ways in found["methods"].items()
    ]
    columns = ["method", "seconds a step", "over LoRA's", "PEFT's over PEFT's LoRA", "over PEFT's own"]
    return table(columns, rows)


def records(found):
    """The first list of records in a result, as it stands: a column for each of their fields."""
    lines = next(
        (value for value in found.values() if isinstance(value, list) and value and isinstance(value[0], dict)), []
    )
    columns = list(dict.fromkeys(key for line in lines for key in line))
    return table(columns, [[_shown(line.get(key, "")) for key in columns] for line in lines])


def _shown(value):
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def failed(found):
    """The arms that are not compared."""
    lines = [f"- {name}: {reason}" for name, reason in found["failed"].items()]
    return "Not compared:\n\n" + "\n".join(lines) if lines else ""


def dtypes(arm):
    """The dtype of the base and that of the arithmetic."""
    return arm["dtype"] if arm["dtype"] == arm["computes"] else f"{arm['dtype']}, {arm['computes']}"


def seconds(spread):
    """A median with its spread."""
    return f"{spread['median']:.2f} ({spread['p10']:.2f} to {spread['p90']:.2f})"


def times(ratio):
    """A ratio with its interval, if it has one."""
    if not ratio:
        return ""
    interval = f" [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio["low"] else ""
    return f"{ratio['value']:.2f}{interval}"


def inverse(ratio):
    """The same ratio from the other side."""
    if not ratio:
        return None
    ends = [1 / ratio["high"], 1 / ratio["low"]] if ratio["low"] else [None, None]
    return {"value": 1 / ratio["value"], "low": ends[0], "high": ends[1]}


def table(columns, rows):
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
