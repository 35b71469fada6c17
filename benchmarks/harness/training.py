"""Training by one arm, in this process: every arm has the model, adapter and rows of one directory."""

import json
import tempfile
from pathlib import Path

import attrs

from harness import clock as clocks
from harness.arms import ARMS, fields_of_sft
from harness.workload import TARGETS, Workload, lora

LEARNING_RATE = 1e-4


@attrs.define
class Recorder:
    """What came of the steps of an arm: losses, supervised tokens, the first gradient and the last adapter.

    Args:
        clock: of this process.
        place: where gradient and adapter are written; None for nowhere.
    """

    clock: clocks.Clock
    place: Path | None = None
    losses: list = attrs.field(factory=list)
    supervised: list = attrs.field(factory=list)
    trained_dtype: str = ""

    def after_step(self, model):
        """The optimizer has taken a step; gradients are still there."""
        self.clock.step()
        if len(self.clock.seconds) == 1:
            adapter = _adapter(model)
            self.trained_dtype = str(next(iter(adapter.values())).dtype).removeprefix("torch.")
            self._write("gradient", {name: parameter.grad for name, parameter in adapter.items()})
        self.clock.begin()

    def finish(self, model):
        """Training is over."""
        self._write("adapter", _adapter(model))

    def _write(self, name, tensors):
        from safetensors.torch import save_file

        if self.place:
            found = {key: tensor.detach().float().contiguous() for key, tensor in tensors.items()}
            save_file(found, self.place / f"{name}.safetensors")


def train(name, directory, clock, place=None):
    """Have arm `name` do the work in `directory`; the figures of this run, as plain values."""
    workload = Workload(**json.loads((directory / "workload.json").read_text()))
    recorder = Recorder(clock, place)
    {"tunekit": by_tunekit, "transformers": by_transformers, "trl": by_trl}[ARMS[name].trainer](
        ARMS[name], workload, directory, recorder
    )
    return {
        "arm": name,
        "startup": clock.marks,
        "seconds": clock.seconds,
        "ends": clock.ends,
        "losses": recorder.losses,
        "supervised": recorder.supervised,
        "trained_dtype": recorder.trained_dtype,
        "peak_mib": clocks.peak_mib(),
    }


def by_tunekit(arm, workload, directory, recorder):
    """`tk.SFT` on what `tk.LoRA` attaches."""
    import tunekit as tk  # isort: skip - before the others, as a user's script has it: it asks for large pages
    import peft  # noqa: F401 - imported here, so that it counts as import and not as loading
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from tunekit.core.model.base import Base
    from tunekit.core.registry import default_registry
    from tunekit.core.run.observers import Observers

    recorder.clock.mark("import")
    base = Base(model=str(directory / "model"))
    context = tk.Context(model_id="benchmark", device="cpu", dtype=arm.dtype, total_steps=workload.steps)
    model = tk.LoRA(rank=workload.rank, targets=TARGETS).attach(base.load(device="cpu", dtype=arm.dtype), context)
    _take_adapter(model, directory)
    recorder.clock.mark("load")
    tokenizer = base.tokenizer()
    rows = json.loads((directory / "rows.json").read_text())["train"]
    recorder.clock.mark("data")
    known = {name: value for name, value in arm.settings.items() if name in fields_of_sft()}
    trainer = tk.SFT(
        max_steps=workload.steps,
        batch_size=workload.rows_per_step,
        learning_rate=LEARNING_RATE,
        schedule="constant",
        warmup=0.0,
        order="as-given",
        save_every=workload.steps + 1,
        **known,
    )
    with tempfile.TemporaryDirectory() as place:
        log = tk.RunLog(directory=Path(place), observers=Observers(default_registry(), ()))
        recorder.clock.begin()
        trainer.fit(
            model,
            tokenizer,
            rows,
            after_step=lambda model, step: recorder.after_step(model),
            extra_loss=lambda model: None,
            validate=None,
            run=log,
            context=context,
        )
        lines = [json.loads(line) for line in (Path(place) / "metrics.jsonl").read_text().splitlines()]
    recorder.losses += [line["loss"] for line in lines]
    recorder.supervised += [line["tokens"] for line in lines]
    recorder.finish(model)


def by_transformers(arm, workload, directory, recorder):
    """`transformers.Trainer`: rows are padded to the longest of the step, logits made of every token."""
    import torch
    from peft import get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    recorder.clock.mark("import")
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=getattr(torch, arm.dtype))
    model = get_peft_model(model, lora(workload))
    _take_adapter(model, directory)
    recorder.clock.mark("load")
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    rows = json.loads((directory / "rows.json").read_text())["train"]
    with tempfile.TemporaryDirectory() as place:
        trainer = _counting(Trainer, recorder)(
            model=model,
            args=TrainingArguments(output_dir=place, **_common(workload), **arm.settings),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
            callbacks=[_following(recorder)],
        )
        recorder.clock.mark("data")
        trainer.train()
    recorder.finish(model)


def by_trl(arm, workload, directory, recorder):
    """TRL's `SFTTrainer`, given the path of the model as its documentation does; rows are tokenized already."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    recorder.clock.mark("import")
    # What it was given decides where loading ends: it loads the model and prepares the rows in one constructor.
    rows = Dataset.from_list(json.loads((directory / "rows.json").read_text())["train"])
    with tempfile.TemporaryDirectory() as place:
        kind = {} if arm.dtype == "float32" else {"model_init_kwargs": {"dtype": getattr(torch, arm.dtype)}}
        trainer = _counting(SFTTrainer, recorder)(
            model=str(directory / "model"),
            args=SFTConfig(output_dir=place, **_common(workload), **kind, **arm.settings),
            train_dataset=rows,
            peft_config=lora(workload),
            callbacks=[_following(recorder)],
        )
        _take_adapter(trainer.model, directory)
        recorder.clock.mark("load")
        recorder.clock.mark("data")
        trainer.train()
    recorder.finish(trainer.model)


def _common(workload):
    """Arguments that all arms of transformers have: the same work, and nothing written."""
    return {
        "max_steps": workload.steps,
        "per_device_train_batch_size": workload.rows_per_step,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def _following(recorder):
    from transformers import TrainerCallback

    class Following(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            recorder.clock.begin()

        def on_optimizer_step(self, args, state, control, model, **kwargs):
            recorder.after_step(model)

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                recorder.losses.append(logs["loss"])

    return Following()


def _counting(trainer, recorder):
    """`trainer`, noting how many tokens of a step carry loss."""

    class Counting(trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            recorder.supervised.append(int((inputs["labels"][:, 1:] != -100).sum()))
            return super().training_step(model, inputs, *args, **kwargs)

    return Counting


def _take_adapter(model, directory):
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(directory / "adapter" / "adapter_model.safetensors"))


def _adapter(model):
    """The trained parameters by name, the same names in every arm."""
    trained = {
        name.replace("_orig_mod.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return dict(sorted(trained.items()))
