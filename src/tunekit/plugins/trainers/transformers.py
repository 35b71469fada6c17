"""Transformers: the `transformers.Trainer`, for those who want exactly that."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.component import Context
from tunekit.core.data import batching
from tunekit.core.data.codec import Codec, TrainOn
from tunekit.core.evaluation.predicting import pad_id
from tunekit.core.fields import did_you_mean
from tunekit.core.interfaces import Encoded, Example, Trainer
from tunekit.core.outcomes import TrainResult
from tunekit.errors import ConfigError, NotSupported

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

    from tunekit.core.run.run_log import RunLog

OURS = ("output_dir", "seed", "use_cpu", "do_train", "resume_from_checkpoint")
"""Arguments that the pipeline sets."""


@attrs.frozen(kw_only=True)
class Transformers(Trainer):
    """`transformers.Trainer` with any of its arguments and callbacks; its batches and loss are its own.

    Rows, masks, method and evaluation are tunekit's, as with any trainer. Checkpoints are the Trainer's own
    (`save_strategy`); a run cannot be resumed by `resume=True`. https://huggingface.co/docs/transformers/main_classes/trainer

    Args:
        arguments: fields of `transformers.TrainingArguments` by name; the learning rate defaults to the
            adapter method's own.
        callbacks: `transformers.TrainerCallback` objects; being Python objects, they are no part of a saved recipe.
        max_length: longest row in tokens; None means the model's context length.
        train_on: "assistant" (all its turns), "last" (its last turn) or "all" (every token).
    """

    name = "transformers"

    arguments: Mapping[str, Any] = attrs.field(factory=dict)
    callbacks: tuple[Any, ...] = attrs.field(default=(), metadata={"recipe": False})
    max_length: int | None = None
    train_on: TrainOn = "assistant"

    def check(self, context: Context) -> None:
        """The package behind `deepspeed` must be installed: it is looked for as soon as arguments are made."""
        if self.arguments.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
            raise ConfigError("needs deepspeed: pip install deepspeed", "Transformers.arguments.deepspeed")

    def planned_steps(self, rows: int) -> int:
        """Optimizer steps on `rows` rows, by the Trainer's own arithmetic for one process."""
        arguments = self._arguments("unused", None)
        if arguments.max_steps > 0:
            return int(arguments.max_steps)
        micro_steps = batching.steps_per_epoch(rows, arguments.per_device_train_batch_size)
        if arguments.dataloader_drop_last:
            micro_steps = rows // arguments.per_device_train_batch_size
        per_epoch = batching.steps_per_epoch(micro_steps, arguments.gradient_accumulation_steps)
        return int(-(-arguments.num_train_epochs * per_epoch // 1))

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

        if run.resumed:
            raise NotSupported("the transformers trainer cannot go on with a run; use SFT for runs to be resumed")
        if extra_loss(model) is not None:
            raise NotSupported("the transformers trainer cannot add this method's extra loss once a step; use SFT")
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
        return TrainResult(steps=outcome.global_step, metrics={"loss": outcome.training_loss})

    def _arguments(self, output: str, context: Context | None) -> TrainingArguments:
        from transformers import TrainingArguments

        known = {field.name for field in TrainingArguments.__dataclass_fields__.values()}
        for name in self.arguments:
            if name in OURS:
                raise ConfigError("is set by the pipeline", f"Transformers.arguments.{name}")
            if name not in known:
                raise ConfigError(f"unknown field{did_you_mean(name, known)}", f"Transformers.arguments.{name}")
        defaults = {"report_to": "none", "save_strategy": "no", "logging_steps": 1}
        ours: dict[str, Any] = {"output_dir": output}
        if context:
            defaults["learning_rate"] = self.peak_learning_rate(context)
            ours |= {"seed": context.seed, "use_cpu": context.device == "cpu"}
        # Rows must keep their labels, and a step's loss is to be the mean over its tokens, not over its batches.
        return TrainingArguments(**{**defaults, **self.arguments, **ours, "remove_unused_columns": False})


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
