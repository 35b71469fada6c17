"""Transformers: the `transformers.Trainer`, for those who want exactly that."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.component import Context
from tunekit.core.data import batching
from tunekit.core.data.codec import Codec, TrainOn
from tunekit.core.evaluation.predicting import pad_id
from tunekit.core.fields import did_you_mean
from tunekit.core.interfaces import Encoded, Example, Trainer
from tunekit.core.model.quick_imports import import_bitsandbytes
from tunekit.core.outcomes import TrainResult
from tunekit.core.run import checkpoint
from tunekit.core.training.deepspeed import launched_stage, stage_of
from tunekit.core.training.parallel import check_launch, launched, started
from tunekit.errors import ConfigError, NotSupported
from tunekit.plugins.trainers import deepspeed

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

    from tunekit.core.run.run_log import RunLog

OURS = ("output_dir", "seed", "use_cpu", "do_train", "resume_from_checkpoint")
"""Arguments that the pipeline sets."""
COUNTING = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "dataloader_drop_last",
)
"""Those that say how many steps there are."""


@attrs.frozen(kw_only=True)
class Transformers(Trainer):
    """`transformers.Trainer` with any of its arguments and callbacks; its batches and loss are its own.

    Rows, masks, method and evaluation are tunekit's, as with any trainer. Several processes share a run as the Trainer
    has them, by DistributedDataParallel or DeepSpeed. Checkpoints are the Trainer's own (`save_strategy`); a run cannot
    be resumed by `resume=True`. https://huggingface.co/docs/transformers/main_classes/trainer

    Args:
        arguments: fields of `transformers.TrainingArguments` by name; the learning rate defaults to the
            adapter method's own. `per_device_train_batch_size` is of each process; `deepspeed` is a configuration of
            DeepSpeed, a table or the path of its JSON file.
        callbacks: `transformers.TrainerCallback` objects; being Python objects, they are no part of a saved recipe.
        max_length: longest row in tokens; None means the model's context length.
        train_on: "assistant" (all its turns), "last" (its last turn) or "all" (every token).
    """

    name = "transformers"
    several_processes = True

    arguments: Mapping[str, Any] = attrs.field(factory=dict)
    callbacks: tuple[Any, ...] = attrs.field(default=(), metadata={"recipe": False})
    max_length: int | None = None
    train_on: TrainOn = "assistant"

    @property
    def zero_stage(self) -> int | None:
        """The stage of the configuration among the arguments, else of the launcher's; None without DeepSpeed."""
        given = self.arguments.get("deepspeed")
        return stage_of(given, "Transformers.arguments.deepspeed") if given else launched_stage()

    def check(self, context: Context) -> None:
        """The package behind DeepSpeed must be installed."""
        if self.zero_stage is not None and importlib.util.find_spec("deepspeed") is None:
            raise ConfigError(
                'needs deepspeed: pip install "tunekit-sdk[deepspeed]"', "Transformers.arguments.deepspeed"
            )

    def planned_steps(self, rows: int) -> int:
        """Optimizer steps on `rows` rows, by the Trainer's own arithmetic for as many processes as were started."""
        self._check_names()
        # To look at the values they must be made into arguments, which starts what the processes speak by: the run
        # does that before, and a plan need not.
        if self.zero_stage is None and launched() == started().count:
            self._arguments("unused", None)
        batch, accumulated, epochs, most, whole_only = map(self._value, COUNTING)
        if most > 0:
            return int(most)
        batches = rows // batch if whole_only else batching.steps_per_epoch(rows, batch)
        # A process that would go without in the last turn gets rows of the first one once more.
        share = batches // launched() if whole_only else batching.steps_per_epoch(batches, launched())
        per_epoch = max(1, batching.steps_per_epoch(share, accumulated))
        return int(-(-epochs * per_epoch // 1))

    def peak_learning_rate(self, context: Context) -> float:
        """The learning rate among the arguments, else the adapter method's."""
        return float(self.arguments.get("learning_rate", context.learning_rate))

    def encode(self, example: Example, codec: Codec) -> Encoded:
        """Tokens of a row, with labels on what `train_on` names."""
        return codec.encode(example, self.train_on)

    def encoding(self) -> str:
        """Of its fields, `train_on`."""
        return f"train_on={self.train_on}"

    def fit(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[Encoded],
        *,
        after_step: Callable[[nn.Module, int], None],
        extra_loss: Callable[[nn.Module], Tensor | None],
        validate: Callable[[], Mapping[str, float]] | None,
        run: RunLog,
        context: Context,
    ) -> TrainResult:
        """Train `model` in place; see `Trainer.fit`. NotSupported for a resumed run or a method with an extra loss."""
        import transformers

        check_launch(self)  # a run has asked before, `verify` has not
        if run.resumed:
            raise NotSupported("the transformers trainer cannot go on with a run; use SFT for runs to be resumed")
        if extra_loss(model) is not None:
            raise NotSupported("the transformers trainer cannot add this method's extra loss once a step; use SFT")
        deepspeed.check(self.zero_stage, model)
        with deepspeed.told(context.device) if self.zero_stage is not None else nullcontext(), _on(context.device):
            trainer = transformers.Trainer(
                model=model,
                args=self._arguments(str(run.directory / "transformers"), context),
                train_dataset=list(train),
                data_collator=partial(batching.collate, pad_id=pad_id(tokenizer)),
                callbacks=[_bridge(after_step, run), *self.callbacks],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.remove_callback(transformers.ProgressCallback)
            outcome = trainer.train()
            if self.zero_stage is not None:
                run.note(f"trained by DeepSpeed, ZeRO {self.zero_stage}; {deepspeed.share_of(model)}")
                deepspeed.take_back(trainer.model_wrapped, model)
        if run.processes.count > 1:
            run.processes.check_same("what is trained", checkpoint.checksums(model))
        return TrainResult(steps=outcome.global_step, metrics={"loss": outcome.training_loss})

    def _arguments(self, output: str, context: Context | None) -> TrainingArguments:
        self._check_names()
        import torch
        from transformers import TrainingArguments

        defaults = {"report_to": "none", "save_strategy": "no", "logging_steps": 1}
        ours: dict[str, Any] = {"output_dir": output, "use_cpu": not torch.cuda.is_available()}
        if context:
            on_cpu = context.device == "cpu"
            defaults |= {"learning_rate": self.peak_learning_rate(context), "dataloader_pin_memory": not on_cpu}
            # To the Trainer, DeepSpeed and `use_cpu` exclude each other.
            with_deepspeed = self.zero_stage is not None
            ours |= {"seed": context.seed, "use_cpu": on_cpu and not with_deepspeed}
            if with_deepspeed:
                ours["accelerator_config"] = {"use_configured_state": True}
        with _on("cuda"):  # it makes the first GPU the current one
            # Rows must keep their labels, and a step's loss is to be the mean over its tokens, not over its batches.
            made = TrainingArguments(**{**defaults, **self.arguments, **ours, "remove_unused_columns": False})
        if context and context.device.startswith("cuda") and launched() == 1 and self.zero_stage is None:
            # By itself it would take all GPUs (nn.DataParallel), the first one before the model's.
            made._n_gpu, made._setup_devices = 1, torch.device("cuda", _number(context.device))
        return made

    def _check_names(self) -> None:
        """Raise ConfigError for an argument that there is not, or that is not the user's to set."""
        known = _fields()
        several = {"accelerator_config"} if launched() > 1 or self.zero_stage is not None else set()
        for name in self.arguments:
            if name in {*OURS, *several}:
                raise ConfigError("is set by the pipeline", f"Transformers.arguments.{name}")
            if name not in known:
                raise ConfigError(f"unknown field{did_you_mean(name, known)}", f"Transformers.arguments.{name}")

    def _value(self, name: str) -> Any:
        """The argument, or its default."""
        return self.arguments.get(name, _fields()[name].default)


def _number(device: str) -> int:
    """Of a GPU by name; "cuda" is the current one."""
    import torch

    number = torch.device(device).index
    return torch.cuda.current_device() if number is None else int(number)


@contextmanager
def _on(device: str) -> Iterator[None]:
    """Within it, the GPU of that name is the current one, which accelerate takes; afterwards that of before is."""
    import torch

    if device.startswith("cuda") and torch.cuda.is_available():
        with torch.cuda.device(_number(device)):
            yield
    else:
        yield


def _fields() -> Mapping[str, Any]:
    """The fields of `transformers.TrainingArguments` by name."""
    import_bitsandbytes()  # as they do by PEFT, only quicker; whatever the trainer does begins with this
    from transformers import TrainingArguments

    found: Mapping[str, Any] = TrainingArguments.__dataclass_fields__
    return found


def _bridge(after_step: Callable[[nn.Module, int], None], run: RunLog) -> TrainerCallback:
    """Carries the Trainer's events to tunekit: the slot after each optimizer step, and its log lines."""
    from transformers import TrainerCallback

    class Bridge(TrainerCallback):  # type: ignore[misc]
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            # The only slot where gradients are still there; global_step is counted up afterwards.
            after_step(model, state.global_step + 1)

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                run.log(state.global_step, {name: float(logs[name]) for name in logs if name != "epoch"})

    return Bridge()
