"""The runs of test_parallel.py, test_sharded.py and test_deepspeed.py: a user's script, started as one process or by a launcher as several."""

import json
import os
import shutil
import signal
import sys
import time
import weakref
from pathlib import Path

import attrs
import torch
from safetensors.torch import load_file

import tunekit as tk
from tunekit.core.common.distributions import release
from tunekit.core.model.base import load_base
from tunekit.core.run import files
from tunekit.core.training import parallel
from tunekit.core.training.sharded import CUTS_INTEGERS

ROWS = [{"prompt": f"repeat {n}", "completion": "ab " * (1 + n * n)} for n in range(9)]
"""Of very different lengths; four a step, so that the last step of an epoch has one row and one process has none."""
METHODS = {
    "lora": tk.LoRA(rank=2),
    "adalora": tk.AdaLoRA(initial_rank=4, target_rank=2, interval=1),
    "ia3": tk.IA3(),
    "loha": tk.LoHa(rank=2),
    "lokr": tk.LoKr(rank=2),
    "bottleneck": tk.Bottleneck(size=4),
    "prompt-tuning": tk.PromptTuning(virtual_tokens=3),
    "prefix-tuning": tk.PrefixTuning(virtual_tokens=3),
    "last-layers": tk.LastLayers(count=1),
    "full": tk.Full(),
}
TRAINER = tk.SFT(
    epochs=2,
    batch_size=4,
    learning_rate=0.01,
    max_grad_norm=0.5,
    save_every=2,
    evaluate_every=3,
    keep_best="perplexity",
)
SHORT = attrs.evolve(TRAINER, epochs=1)
IN_PIECES = attrs.evolve(SHORT, parallel="sharded")
SHARDED = {"lora": METHODS["lora"], "full": METHODS["full"], "qlora": tk.QLoRA(rank=2)}
if release(torch.__version__) < CUTS_INTEGERS:  # refused there, as a test says
    del SHARDED["qlora"]
DROPOUT = tk.LoRA(rank=2, dropout=0.5)
IN_BFLOAT16 = {"lora": METHODS["lora"], "full": METHODS["full"], "dropout": DROPOUT}
EARLY = attrs.evolve(TRAINER, learning_rate=0.5, evaluate_every=1, patience=1, restore_best=True)
"""Its second evaluation is the best by far, and it stops at the third."""
EVEN = ROWS[:8]
"""Shared out evenly: `transformers.Trainer` takes rows twice where a process would go without."""
CONFIGURATION = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_force_ds_cpu_optimizer": False,
}
"""Every parameter in pieces, however small."""
STOP = 4
"""The step at which a run is asked to stop."""


class Stops:
    """Sends SIGTERM to the first process, which alone has observers, while the others are in their next step or not."""

    @tk.hookimpl
    def tunekit_log(self, step):
        if step == STOP:
            os.kill(os.getpid(), signal.SIGTERM)


class Watched:
    """Loads bases and tells when their weights are whole in this process: from before the first until no more are.

    On the clock of the machine, which is the same in all processes. Of an earlier base nothing is left, pieces included.
    """

    def __init__(self):
        self.spans, self.whole, self.models = [], set(), []

    def __call__(self, *what):
        assert not any(earlier() for earlier in self.models)
        self.spans.append([time.monotonic(), None])
        model = load_base(*what)
        self.models.append(weakref.ref(model))
        for number, value in enumerate([*model.parameters(), *model.buffers()]):
            if value.numel() > 1000:  # norms are whole anywhere
                self.whole.add(key := (len(self.spans) - 1, number))
                weakref.finalize(value, self.gone, key)
        return model

    def gone(self, key):
        self.whole.remove(key)
        if not any(span == key[0] for span, _ in self.whole):
            self.spans[key[0]][1] = time.monotonic()


class Fails:
    """Loads bases, and raises on one process: the how-many-th time that it is asked for one."""

    def __init__(self, rank, how_many):
        self.rank, self.left = rank, how_many

    def __call__(self, *what):
        self.left -= 1
        if not self.left and parallel.started().rank == self.rank:
            raise tk.ConfigError("the disk is gone")
        return load_base(*what)


def theirs(processes=1, **arguments):
    """`transformers.Trainer`, four rows a step over all processes."""
    rows = 4 // processes
    common = {"num_train_epochs": 2, "learning_rate": 0.01, "max_grad_norm": 0.5, "per_device_train_batch_size": rows}
    return tk.Transformers(arguments=common | arguments)


def make(model, adapter, trainer=TRAINER, rows=ROWS, dtype="float32"):
    if adapter in (METHODS["full"], METHODS["last-layers"]):
        # At 0.01, six steps of Adam make 2e-6 of the rounding where a gradient is next to nothing.
        trainer = attrs.evolve(trainer, learning_rate=1e-3)
    return tk.Pipeline(
        model=str(model),
        data=tk.InMemory(rows=rows),
        validation=tk.InMemory(rows=[{"prompt": f"say {n}", "completion": "b" * (n + 1)} for n in range(3)]),
        adapter=adapter,
        trainer=trainer,
        device="cpu",
        dtype=dtype,
    )


def unfinished(run, directory):
    """A copy of a run as it was when its last checkpoint was written."""
    return shutil.copytree(run, directory, ignore=shutil.ignore_patterns(files.ADAPTER, files.RESULT))


def check_early(directory):
    """The run in `directory`, by `EARLY`, ended with what the checkpoint of its best evaluation has, to the last bit."""
    run = tk.open_run(directory)
    step = run.result["training"]["best_step"]
    assert (step, run.result["training"]["steps"]) == (2, 3)
    stored = load_file(directory / f"checkpoints/step-{step:06d}/parameters.safetensors")
    saved = load_file(directory / "adapter/adapter_model.safetensors")
    assert len(saved) == len(stored) > 0
    for name, value in saved.items():
        assert torch.equal(value, stored[name.replace(".weight", ".default.weight")]), name
    assert run.metrics == run.evaluations[f"step-{step:06d}"]["metrics"]


def main(what, model, directory):
    if what == "methods":
        for name, adapter in METHODS.items():
            run = make(model, adapter).run(directory / name)
            assert run.metrics["perplexity"] > 0
        try:
            make(model, METHODS["lora"]).run(directory / "lora")
        except tk.RunExists:
            (directory / f"refused-{os.environ['RANK']}").touch()  # on every process
        make(model, DROPOUT).run(directory / "dropout")
        for name, adapter in IN_BFLOAT16.items():
            make(model, adapter, dtype="bfloat16").run(directory / "bfloat16" / name)
        attrs.evolve(make(model, METHODS["lora"], EARLY), baselines=(tk.Prompted(shots=1),)).run(directory / "early")
        stopped = {"dropout": make(model, DROPOUT), "adalora": make(model, METHODS["adalora"])}
        stopped["dropout-in-bfloat16"] = attrs.evolve(stopped["dropout"], dtype="bfloat16")
        for name, pipeline in stopped.items():
            try:
                pipeline.run(directory / "stopped" / name, observers=[Stops()])
            except SystemExit as error:
                (directory / f"{name}-left-{os.environ['RANK']}").write_text(str(error.code))
        make(model, METHODS["lora"], theirs(2), EVEN).run(directory / "theirs")
        make(model, METHODS["lora"], theirs(2, gradient_accumulation_steps=2)).run(directory / "theirs-uneven")
    elif what == "resume":
        make(model, DROPOUT).run(directory / "dropout", resume=True)
        make(model, DROPOUT, dtype="bfloat16").run(directory / "dropout-in-bfloat16", resume=True)
        make(model, METHODS["adalora"]).run(directory / "adalora", resume=True)
    elif what == "sharded":
        # By the launcher's configuration, and then, without it, by the trainer's field.
        make(model, METHODS["lora"], SHORT).run(directory / "launched", resume=True)
        del os.environ[parallel.FSDP]
        for name, adapter in SHARDED.items():
            load = Watched()
            make(model, adapter, IN_PIECES)._run(directory / name, False, (), load)
            (directory / f"{name}-whole-{os.environ['RANK']}.json").write_text(json.dumps(load.spans))
        for rank in (0, 1):  # before the base is measured, and after
            fails = Fails(rank, rank + 1)
            try:
                make(model, METHODS["lora"], IN_PIECES)._run(directory / f"failed-{rank}", False, (), fails)
            except tk.ConfigError as error:
                (directory / f"failed-{rank}-{os.environ['RANK']}").write_text(str(error))
        make(model, METHODS["lora"], attrs.evolve(EARLY, parallel="sharded")).run(directory / "early")
        for name in ("lora", "full"):
            make(model, METHODS[name], IN_PIECES, dtype="bfloat16").run(directory / "bfloat16" / name)
        make(model, DROPOUT, IN_PIECES).run(directory / "dropout")
        parallel.started().first(lambda: unfinished(directory / "dropout", directory / "resumed"))
        make(model, DROPOUT, IN_PIECES).run(directory / "resumed", resume=True)
    elif what == "deepspeed":
        # By the launcher's configuration, by one of the arguments, and without.
        make(model, METHODS["lora"], theirs(2), EVEN).run(directory / "launched")
        try:
            make(model, METHODS["lora"]).run(directory / "sft")
        except tk.NotSupported as error:
            (directory / f"refused-{os.environ['RANK']}").write_text(str(error))
        del os.environ[parallel.DEEPSPEED]
        for name in ("lora", "loha"):
            run = make(model, METHODS[name], theirs(2, deepspeed=CONFIGURATION), EVEN).run(directory / name)
            assert run.generate("repeat 1", max_new_tokens=3) is not None
            for module in run._model(tuned=True).model.modules():  # nothing of DeepSpeed is left on it
                assert type(module._parameters) is dict
                assert not module._forward_hooks
                assert not module._forward_pre_hooks
        make(model, METHODS["lora"], theirs(2), EVEN).run(directory / "without")
        make(model, METHODS["loha"], theirs(2), EVEN).run(directory / "loha-without")


if __name__ == "__main__":
    sys.modules["matplotlib"] = None  # reports have tables in place of figures, which are half of a tiny run
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
