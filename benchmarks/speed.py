"""How long an optimizer step takes, by tunekit and by plain transformers and PEFT, on the same rows and the same start.

    python benchmarks/speed.py --steps 5 --repeats 3 --out benchmarks/results/speed.json

Every arm trains LoRA on a model of random weights in the shape of SmolLM2-135M, with the same initial adapter, rows,
order and optimizer. Rows have the lengths of GSM8K's: a question that carries no loss and an answer that does. Arms run
in processes of their own, in turn, so that what else the machine does falls on all of them. Compared are ratios within
one run; the loss of the first step must be the same in all.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

SHAPES = {
    "135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "small": {
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 704,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
}
ARMS = ("tunekit", "tunekit, levers off", "transformers.Trainer + peft")
BATCH = 8
RANK = 16


def rows_of(count, vocabulary):
    """Rows with the lengths of GSM8K's questions and answers, log-normal: medians of 60 and 120 tokens."""
    drawn = random.Random(0)
    rows = []
    for _ in range(count):
        question, answer = (max(8, int(drawn.lognormvariate(mean, 0.4))) for mean in (4.1, 4.8))
        ids = [drawn.randrange(10, vocabulary) for _ in range(question + answer)]
        rows.append({"input_ids": ids, "labels": [-100] * question + ids[question:]})
    return rows


def adapted(shape):
    """The model with a LoRA adapter whose B is not zero, the same in every process."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape], max_position_embeddings=1024))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    return model


def by_tunekit(shape, steps, levers):
    """Seconds of each step and the losses, by `tk.SFT`."""
    import tunekit as tk
    from tunekit.core.registry import default_registry
    from tunekit.core.run.observers import Observers
    from tunekit.testing import tiny_tokenizer

    trainer = tk.SFT(
        max_steps=steps,
        batch_size=BATCH,
        learning_rate=1e-4,
        schedule="constant",
        warmup=0.0,
        order="as-given",
        max_grad_norm=1.0,
        save_every=steps + 1,
        padding_free=levers,
        chunked_loss=levers,
    )
    times = [time.perf_counter()]
    with tempfile.TemporaryDirectory() as directory:
        log = tk.RunLog(directory=Path(directory), observers=Observers(default_registry(), ()))
        trainer.fit(
            adapted(shape),
            tiny_tokenizer(),
            rows_of(BATCH * steps, SHAPES[shape]["vocab_size"]),
            after_step=lambda model, step: times.append(time.perf_counter()),
            extra_loss=lambda model: None,
            validate=None,
            run=log,
            context=tk.Context(model_id="benchmark", device="cpu", dtype="float32", total_steps=steps),
        )
        lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return times, [json.loads(line)["loss"] for line in lines]


def by_transformers(shape, steps):
    """The same by `transformers.Trainer`, which pads the rows of a batch and makes logits of every token."""
    from functools import partial

    from transformers import Trainer, TrainerCallback, TrainingArguments

    from tunekit.core.data.batching import collate

    times, losses = [], []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            times.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter())

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                losses.append(logs["loss"])

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            from torch.utils.data import SequentialSampler

            return SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        rows = rows_of(BATCH * steps, SHAPES[shape]["vocab_size"])
        InOrder(
            model=adapted(shape),
            args=arguments,
            train_dataset=rows,
            data_collator=partial(collate, pad_id=0),
            callbacks=[Clock()],
        ).train()
    return times, losses


def one(arm, shape, steps):
    """Run one arm in this process and print its figures as JSON."""
    if arm.startswith("tunekit"):
        times, losses = by_tunekit(shape, steps, levers=arm == "tunekit")
    else:
        times, losses = by_transformers(shape, steps)
    seconds = [after - before for before, after in pairwise(times)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"arm": arm, "seconds": seconds, "losses": losses, "peak_mib": peak}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        one(options.arm, options.shape, options.steps)
        return
    found = []
    for _ in range(options.repeats):
        for arm in ARMS:
            command = [sys.executable, __file__, "--arm", arm, "--shape", options.shape, "--steps", str(options.steps)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append(json.loads(output.splitlines()[-1]))
            print(f"{arm:30} {statistics.median(found[-1]['seconds'][1:]):8.2f} s a step", flush=True)
    report(found, options)


def report(found, options):
    """Check that all arms did the same work, then print and store medians and ratios."""
    import torch

    first = {round(run["losses"][0], 3) for run in found}
    assert len(first) == 1, f"the arms do not start from the same loss: {first}"
    rows = rows_of(BATCH * options.steps, SHAPES[options.shape]["vocab_size"])
    tokens = sum(len(row["input_ids"]) for row in rows) / options.steps
    arms = {}
    for arm in ARMS:
        runs = [run for run in found if run["arm"] == arm]
        seconds = statistics.median(second for run in runs for second in run["seconds"][1:])
        peak = statistics.median(run["peak_mib"] for run in runs)
        arms[arm] = {"seconds_a_step": seconds, "real_tokens_a_second": tokens / seconds, "peak_mib": peak}
    base = arms["tunekit"]["seconds_a_step"]
    print(f"\n{'arm':30} {'s/step':>8} {'tokens/s':>9} {'peak MiB':>9} {'time / tunekit':>15}")
    for arm, figures in arms.items():
        seconds, speed, peak = figures.values()
        print(f"{arm:30} {seconds:8.2f} {speed:9.0f} {peak:9.0f} {seconds / base:15.2f}")
    if options.out:
        machine = {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()}
        machine["torch"] = torch.__version__
        content = {"shape": options.shape, "steps": options.steps, "machine": machine, "arms": arms, "runs": found}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(content, indent=1) + "\n")


def _processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
