"""One arm, or the roof, in a process of its own; started by `harness/rounds.py`, which reads what it writes."""

import argparse
import json
import time
from pathlib import Path

from harness.clock import Clock

BEGAN = time.time()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", help="a name of harness/arms.py, or roof")
    parser.add_argument("--work", type=Path, required=True, help="where the workload was prepared")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--started", type=float, default=BEGAN, help="when this process was started")
    parser.add_argument("--record", type=Path, help="where to write the first gradient and the last adapter")
    options = parser.parse_args(arguments)
    if options.arm == "roof":
        found = roof(options.work)
    else:
        from harness.training import train

        found = train(options.arm, options.work, Clock(options.started), options.record)
    options.out.write_text(json.dumps(found))


def roof(work):
    """The rates of the model's matrix products, by dtype."""
    from harness.roof import gemm_rates
    from harness.workload import Workload, steps_of

    workload = Workload(**json.loads((work / "workload.json").read_text()))
    tokens = max(sum(len(row["input_ids"]) for row in step) for step in steps_of(workload, work))
    return {"arm": "roof", **{dtype: gemm_rates(workload, tokens, dtype) for dtype in ("float32", "bfloat16")}}


if __name__ == "__main__":
    main()
