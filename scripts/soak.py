"""Kill a run again and again (SIGKILL, at seeded random moments), and see that it ends as if nobody had.

    python scripts/soak.py --kills 200

A run is killed `--kills-per-run` times, resumed each time, and then left to finish; then the next one begins. Every
resume must succeed, and every finished run must equal, byte for byte, one that was never killed: its log of metrics and
its adapter. Every other kill waits for a checkpoint to be in the middle of being written. The base is held in float32
and in bfloat16, run by run.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import tunekit as tk

# Read when torch is first imported, which is below: tiny models are fastest on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

DTYPES = ("float32", "bfloat16")
FILES = ("metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json")


def pipeline(model: Path, steps: int, dtype: str) -> tk.Pipeline:
    """A small run in which everything draws random numbers or has a state, and every step is saved."""
    return tk.Pipeline(
        model=str(model),
        data=tk.InMemory(rows=[{"prompt": f"repeat {n}", "completion": f"{n} {n}"} for n in range(32)]),
        adapter=tk.AdaLoRA(initial_rank=4, target_rank=2, dropout=0.1, interval=2),
        trainer=tk.SFT(
            max_steps=steps,
            batch_size=6,
            micro_batch_size=2,
            warmup=0.2,
            save_every=1,
            keep=2,
            keep_best="nll",
            evaluate_every=3,
        ),
        dtype=dtype,
        device="cpu",
    )


def start(model: Path, steps: int, dtype: str, directory: Path, errors: Path) -> int:
    """A process of its own that begins the run or goes on with it. It has all libraries, as this one has them."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        pipeline(model, steps, dtype).run(directory, resume=directory.exists())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, errors: Path) -> bool:
    """Whether the run has ended by itself; an error of its own ends this program."""
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid and status:
        sys.exit(f"a run failed by itself:\n{errors.read_text()}")
    return pid != 0


def killed_at(child: int, directory: Path, errors: Path, seconds: float, saving: bool) -> str:
    """Kill the run after so many seconds, and if asked while it saves. Says what it was doing; "" if it was quicker."""
    until = time.monotonic() + seconds
    while time.monotonic() < until or (saving and not scratch(directory)):
        if ended(child, errors):
            return ""
        time.sleep(0.0002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        return ""
    if scratch(directory):
        return "while a checkpoint was written"
    if not any((directory / "checkpoints").glob("step-*")):
        return "before the first checkpoint"
    if (directory / "result.json").exists():
        return "after the result"
    return "after training" if (directory / "adapter").exists() else "while training"


def scratch(directory: Path) -> list[Path]:
    """Checkpoints that are being written."""
    return list((directory / "checkpoints").glob(".step-*"))


def prepare(model: Path) -> None:
    """Import what a run needs, so that the processes to be killed have it, and make the model."""
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # no figures: half of the time of so short a run
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from tunekit.testing import tiny_model, tiny_tokenizer

    torch.set_num_threads(1)
    tiny_model(attention_dropout=0.1).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kills-per-run", type=int, default=10)
    parser.add_argument("--steps", type=int, default=24, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    root = Path(tempfile.mkdtemp(prefix="tunekit-soak-"))
    model, errors = root / "model", root / "errors.txt"
    prepare(model)

    began = time.monotonic()
    for dtype in DTYPES:
        child = start(model, asked.steps, dtype, root / dtype, errors)
        while not ended(child, errors):
            time.sleep(0.01)
    length = (time.monotonic() - began) / len(DTYPES)

    counts: Counter[str] = Counter()
    runs = quick = 0
    while counts.total() < asked.kills:
        directory, dtype = root / f"run-{runs}", DTYPES[runs % len(DTYPES)]
        killed, done = 0, False
        while not done:
            child = start(model, asked.steps, dtype, directory, errors)
            if killed < asked.kills_per_run and counts.total() < asked.kills:
                moment = killed_at(child, directory, errors, draw.uniform(0, 0.6 * length), saving=draw.random() < 0.5)
                killed += bool(moment)
                counts.update([moment] if moment else [])
                # Killed when all but its report was written, it is finished, and nothing is left to resume.
                done = not moment or (directory / "result.json").exists()
                quick += not moment
            else:
                while not ended(child, errors):
                    time.sleep(0.01)
                done = True
        for name in FILES:
            if (directory / name).read_bytes() != (root / dtype / name).read_bytes():
                sys.exit(f"{directory / name} is not that of the run in {dtype} that was never killed")
        shutil.rmtree(directory)
        runs += 1
    shutil.rmtree(root)
    for moment, count in sorted(counts.items()):
        print(f"{count:4} kills {moment}")
    print(
        f"{counts.total():4} kills in all, in {runs} runs of {asked.steps} steps, by turns in {' and '.join(DTYPES)}; "
        f"{quick} runs were done before"
    )
    took = time.monotonic() - began
    print(f"every resume succeeded, every run ended byte for byte as the one never killed; {took:.0f} s")


if __name__ == "__main__":
    main()
