"""What happens once a run and not once a step: rows tokenized and masked, and several adapters over one base."""

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from harness import clock
from harness.rows import conversations
from harness.workload import Workload, lora, prepare

COUNTS = (1000, 4000, 16000)
"""Rows to prepare."""
RANKS = (4, 8, 16, 32)
"""Of the adapters that are trained in one process."""


def rows(shape):
    """Seconds and memory of preparing rows, by tunekit with its cache empty and filled, and by TRL where it is."""
    by = ["tunekit", *(["trl"] if clock.version("trl") else [])]
    return _points(shape, COUNTS[:1] if shape == "tiny" else COUNTS, {name: f"rows-{name}" for name in by})


def adapters(shape):
    """Seconds from start to end of training 1, 2 and 4 adapters: in one `tk.compare`, and in as many processes."""
    jobs = {"one process": "adapters-together", "a process each": "adapters-apart"}
    return _points(shape, (1,) if shape == "tiny" else (1, 2, 4), jobs)


def _points(shape, ats, names):
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        prepare(Workload(shape=shape, steps=1), work)
        points = [{"at": at, "arms": {name: _measured(job, at, work) for name, job in names.items()}} for at in ats]
    return {"machine": clock.machine(os.cpu_count()), "points": points}


def _measured(job, at, work):
    """One job in a process of its own, with caches of its own."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
            "TUNEKIT_CACHE": cache,
            "HF_DATASETS_CACHE": cache,
            "HF_HUB_OFFLINE": "1",
        }
        began = time.monotonic()
        times = at if job == "adapters-apart" else 1
        for number in range(times):
            asked = number if job == "adapters-apart" else at
            command = [sys.executable, "-m", "harness.preparation", job, str(asked), str(work), cache]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        found = {"seconds": round(time.monotonic() - began, 2), **json.loads(done.stdout.splitlines()[-1])}
    print(job, at, found, flush=True)
    return found


def _file_of(count, cache):
    """GSM8K again and again, every row another by its number."""
    talks, path = conversations(), Path(cache) / "rows.jsonl"
    if not talks:
        raise SystemExit("there is no GSM8K in ../shared to prepare")
    with path.open("w") as file:
        for number in range(count):
            ask, say = talks[number % len(talks)]["messages"]
            asked = {**ask, "content": f"{number}. {ask['content']}"}
            file.write(json.dumps({"prompt": [asked], "completion": [say]}) + "\n")
    return path


def rows_tunekit(count, work, cache):
    """Seconds of `Pipeline`'s own way from a file to encoded rows, twice."""
    import tunekit as tk
    from tunekit.core.data import dataset
    from tunekit.core.data.codec import Codec
    from tunekit.core.model.base import Base

    codec = Codec(Base(model=str(work / "model")).tokenizer())
    load = partial(dataset.load, tk.JsonLines(path=str(_file_of(count, cache))), 0, tk.SFT(), codec, 4096, 0)
    return {"cold": _seconds(load), "warm": _seconds(load)}


def rows_trl(count, work, cache):
    """Seconds of the constructor of TRL's trainer, which prepares them; the model is loaded beforehand."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    path = str(_file_of(count, cache))
    model = AutoModelForCausalLM.from_pretrained(work / "model")
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    settings = SFTConfig(output_dir=cache, report_to="none", use_cpu=True, disable_tqdm=True)
    configuration = lora(Workload())

    def make():
        SFTTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_json(path, cache_dir=cache),
            processing_class=tokenizer,
            peft_config=configuration,
        )

    return {"cold": _seconds(make)}


def adapters_together(count, work, cache):
    """So many adapters by one call of `tk.compare`."""
    import tunekit as tk

    methods = [tk.LoRA(rank=rank) for rank in RANKS[:count]]
    tk.compare(_pipeline(work), adapters=methods, directory=Path(cache) / "runs", budget=tk.Steps(3))
    return {}


def adapters_apart(number, work, cache):
    """One of them, alone."""
    import tunekit as tk

    methods = [tk.LoRA(rank=RANKS[number])]
    tk.compare(_pipeline(work), adapters=methods, directory=Path(cache) / f"{number}", budget=tk.Steps(3))
    return {}


def _pipeline(work):
    import tunekit as tk

    trainer = tk.SFT(batch_size=8, max_length=512, on_long="drop")
    found = conversations()[:128] or [{"prompt": f"What is {n} + {n}?", "completion": str(2 * n)} for n in range(128)]
    return tk.Pipeline(model=str(work / "model"), data=tk.InMemory(rows=found), trainer=trainer)


def _seconds(function):
    began = time.perf_counter()
    function()
    return round(time.perf_counter() - began, 2)


JOBS = {
    "rows-tunekit": rows_tunekit,
    "rows-trl": rows_trl,
    "adapters-together": adapters_together,
    "adapters-apart": adapters_apart,
}


if __name__ == "__main__":
    job, at, work, cache = sys.argv[1:]
    print(json.dumps({**JOBS[job](int(at), Path(work), cache), "peak_mib": round(clock.peak_mib())}))
