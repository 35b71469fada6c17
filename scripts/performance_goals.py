"""The goals of docs/performance.md: what each asks for, and what the results say to it."""

from performance_tables import table, times

NOT_MEASURED = "not measured"
TUNED = ("trl-tuned-float32", "trl-tuned-padding-free", "trl-tuned-bfloat16")
GOALS = (
    ("shipped", "CPU, 135M shape, GSM8K, beside TRL as shipped", "5 times the real tokens a second"),
    ("shipped-memory", "the same", "half the peak memory"),
    ("tuned", "the same, beside the fastest of TRL's tuned arms", "2.5 times"),
    ("plain", "the same, beside plain Trainer + PEFT in bfloat16", "2.5 times"),
    ("vocabulary", "CPU, 0.5B shape, vocabulary of 152k, beside TRL as shipped", "8 times"),
    ("mfu", "MFU of the measured roof, 0.5B shape, 2,000 tokens a step", "at least 0.5"),
    ("loha", "LoHa, time a step over LoRA's", "at most 1.15"),
    ("lokr", "LoKr, time a step over LoRA's", "at most 1.15"),
    ("qlora", "QLoRA on the CPU, time a step over LoRA's in bfloat16", "at most 1.3"),
    ("gpu", "one H200, Llama-3-8B shape, bfloat16 LoRA, length 2,048", "50 % MFU; 2.5 and 1.3 times TRL"),
    ("gpu-nf4", "the same with NF4", "90 % of LoRA's rate"),
)


def goals(results):
    """The table: every goal, what was measured, whether it is reached, and why not where somebody knows."""
    remarks = results.get("remarks", {})
    rows = []
    for key, work, wanted in GOALS:
        found, reached = _reached(key, results)
        word = {True: "yes", False: "no", None: ""}[reached]
        rows.append([work, wanted, found, word, remarks.get(key, "")])
    return table(["work", "goal", "measured", "reached", "remark"], rows)


def _reached(key, results):
    """What was measured for a goal, in words, and whether it is reached; None where it is not measured."""
    if key in ("shipped", "plain", "tuned"):
        arms = {"shipped": ("trl",), "plain": ("transformers-bfloat16",), "tuned": TUNED}[key]
        return _faster(results.get("speed"), arms, 5 if key == "shipped" else 2.5)
    if key == "shipped-memory":
        return _smaller(results.get("speed"))
    if key == "vocabulary":
        return _faster(results.get("speed-0.5b"), ("trl",), 8)
    if key == "mfu":
        mfu = _arm(results.get("speed-0.5b-full"), "tunekit").get("mfu")
        if not mfu:
            return NOT_MEASURED, None
        return f"{mfu:.2f} at {results['speed-0.5b-full']['workload']['tokens_per_step']:,} tokens", mfu >= 0.5
    name, most = {"loha": ("LoHa", 1.15), "lokr": ("LoKr", 1.15), "qlora": ("QLoRA", 1.3)}.get(key, ("", 0))
    ratio = results.get("methods", {}).get("methods", {}).get(name, {}).get("lean", {}).get("to LoRA")
    return (f"{ratio:.2f}", ratio <= most) if ratio else (NOT_MEASURED, None)


def _smaller(found):
    """How much of TRL's memory tunekit takes, as it comes and computing activations again as TRL does."""
    theirs, *arms = (_arm(found, name) for name in ("trl", "tunekit", "tunekit-recomputing"))
    shares = [arm["peak_mib"] / theirs["peak_mib"] for arm in arms if arm and theirs]
    if not shares:
        return NOT_MEASURED, None
    said = f"{shares[0]:.2f} of it"
    if len(shares) > 1:
        speed = arms[1]["real_tokens_per_second"] / theirs["real_tokens_per_second"]
        said += f"; {shares[1]:.2f}, and {speed:.1f} times the tokens a second, computing activations again as TRL does"
    return said, shares[0] <= 0.5


def _faster(found, names, least):
    """By how much tunekit is faster than the fastest of these arms."""
    ratios = [ratio for name in names if (ratio := _arm(found, name).get("ratio"))]
    if not ratios:
        return NOT_MEASURED, None
    best = min(ratios, key=lambda ratio: ratio["value"])
    return times(best), best["value"] >= least


def _arm(found, name):
    return (found or {}).get("arms", {}).get(name, {})
