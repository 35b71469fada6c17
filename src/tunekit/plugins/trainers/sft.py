"""SFT: supervised fine-tuning, a training loop to be read from top to bottom."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs

from tunekit.core import batching, rows_loss
from tunekit.core.batching import Order
from tunekit.core.checkpoint import set_random_states
from tunekit.core.codec import Codec, TrainOn
from tunekit.core.component import Context
from tunekit.core.evaluation import pad_id
from tunekit.core.fields import at_least, between, positive
from tunekit.core.interfaces import Encoded, Example, Trainer, TrainResult
from tunekit.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import PreTrainedTokenizerBase

    from tunekit.core.run import RunLog

OPTIMIZERS = {
    "adamw": "torch.optim:AdamW",
    "adamw-8bit": "bitsandbytes.optim:AdamW8bit",
    "adafactor": "torch.optim:Adafactor",
    "sgd": "torch.optim:SGD",
}
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
    "inverse-sqrt": "inverse_sqrt",
}
AUTO_MICRO_BATCH_TOKENS = 4096
"""Padded tokens in one forward pass where the user does not say how many rows."""


@attrs.frozen(kw_only=True)
class SFT(Trainer):
    """Supervised fine-tuning: next-token cross-entropy on what the assistant says.

    The loss of a step is the mean over all supervised tokens of its `batch_size` rows. How they are split into forward
    passes never changes it.

    Args:
        epochs: passes over the training rows; ignored where max_steps is given.
        max_steps: optimizer steps; None lets epochs decide.
        learning_rate: the highest, reached after the warm-up; None takes the adapter method's own.
        schedule: how the learning rate falls: "cosine", "linear", "constant" or "inverse-sqrt".
        warmup: share of the steps over which the learning rate rises from 0.
        optimizer: "adamw", "adamw-8bit" (bitsandbytes), "adafactor" or "sgd".
        weight_decay: decay of matrices per step, times the learning rate; vectors (biases, norms) are left alone.
        max_grad_norm: longer gradients are scaled down to this length; `float("inf")` for never.
        batch_size: rows an optimizer step learns from.
        micro_batch_size: rows in one forward pass, or "auto"; a matter of memory and speed alone.
        padding_free: rows of a forward pass are laid end to end, each attending to itself alone, where the model gives
            the same loss so; it is tried on rows of yours, and the log says why where it cannot be.
        chunked_loss: logits are made only where a token is supervised and some tokens at a time, their gradient with
            them, where the model gives the same loss so.
        max_length: longest row in tokens; None means the model's context length.
        train_on: "assistant" (all its turns), "last" (its last turn) or "all" (every token).
        on_long: "error", "drop" or "truncate" rows that are longer than max_length, or "split" them into windows, which
            works for plain texts; counted in plan and result.
        order: rows "shuffled" anew each epoch by the seed, or "as-given".
        save_every: steps between checkpoints; None saves at the end of each epoch.
        keep: how many checkpoints stay, the newest.
        evaluate_every: steps between evaluations while training; None for none.
        log_every: steps between log lines.
    """

    name = "sft"

    epochs: float = attrs.field(default=3, validator=[positive, between(0, math.inf)])
    max_steps: int | None = attrs.field(default=None, validator=at_least(1))
    learning_rate: float | None = attrs.field(default=None, validator=[positive, between(0, math.inf)])
    schedule: Literal["cosine", "linear", "constant", "inverse-sqrt"] = "cosine"
    warmup: float = attrs.field(default=0.03, validator=between(0, 1))
    optimizer: Literal["adamw", "adamw-8bit", "adafactor", "sgd"] = "adamw"
    weight_decay: float = attrs.field(default=0.0, validator=at_least(0))
    max_grad_norm: float = attrs.field(default=1.0, validator=positive)
    batch_size: int = attrs.field(default=16, validator=at_least(1))
    micro_batch_size: int | Literal["auto"] = attrs.field(default="auto", validator=at_least(1))
    padding_free: bool = True
    chunked_loss: bool = True
    max_length: int | None = attrs.field(default=None, validator=at_least(2))
    train_on: TrainOn = "assistant"
    on_long: Literal["error", "drop", "truncate", "split"] = "error"
    order: Order = "shuffled"
    save_every: int | None = attrs.field(default=None, validator=at_least(1))
    keep: int = attrs.field(default=2, validator=at_least(1))
    evaluate_every: int | None = attrs.field(default=None, validator=at_least(1))
    log_every: int = attrs.field(default=1, validator=at_least(1))

    def check(self, context: Context) -> None:
        """The optimizer's package must be installed."""
        package = OPTIMIZERS[self.optimizer].partition(".")[0]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{self.optimizer!r} needs {package}: pip install {package}", "SFT.optimizer")

    def planned_steps(self, rows: int) -> int:
        """Optimizer steps on `rows` rows: max_steps, or whole epochs, the last step of each taking what is left."""
        return self.max_steps or max(1, math.ceil(self.epochs * batching.steps_per_epoch(rows, self.batch_size)))

    def peak_learning_rate(self, context: Context) -> float:
        """The user's learning rate, else the adapter method's."""
        return context.learning_rate if self.learning_rate is None else self.learning_rate

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
        """Train `model` in place; see `Trainer.fit`. TrainingError for a loss or gradient that is not finite."""
        from accelerate import Accelerator

        steps = self.planned_steps(len(train))
        save_every = self.save_every or batching.steps_per_epoch(len(train), self.batch_size)
        accelerator = Accelerator(cpu=context.device == "cpu", device_placement=False)
        optimizer = self._optimizer(model, self.peak_learning_rate(context))
        schedule = self._schedule(optimizer, steps)
        first = 1
        if run.resumed:
            first = run.resumed.step + 1
            optimizer.load_state_dict(run.resumed.state["trainer"]["optimizer"])
            schedule.load_state_dict(run.resumed.state["trainer"]["schedule"])
            set_random_states(run.resumed.state["random"])
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        summed_loss = rows_loss.choose(
            model,
            _shortest_and_longest(train),
            pad_id(tokenizer),
            context.device,
            padding_free=self.padding_free,
            chunked=self.chunked_loss,
        )
        for note in summed_loss.notes:
            run.note(note)
        model, optimizer = accelerator.prepare(model, optimizer)
        model.train()

        with summed_loss.training():
            for step in range(first, steps + 1):
                rows = [
                    train[at]
                    for at in batching.rows_of_step(step, len(train), self.batch_size, context.seed, self.order)
                ]
                tokens = sum(map(batching.supervised_tokens, rows))
                loss = 0.0
                for micro_batch in self._micro_batches(rows, padded=not summed_loss.padding_free):
                    # Divided by the tokens of the whole step: every token weighs the same however rows are split.
                    part = summed_loss(model, micro_batch) / tokens
                    accelerator.backward(part)
                    loss += part.item()
                extra = extra_loss(accelerator.unwrap_model(model))
                if extra is not None:
                    accelerator.backward(extra)
                norm = accelerator.clip_grad_norm_(trained, self.max_grad_norm)
                _check_finite(step, loss, float(norm))
                rate = schedule.get_last_lr()[0]
                optimizer.step()
                schedule.step()
                after_step(accelerator.unwrap_model(model), step)
                optimizer.zero_grad()

                if step % self.log_every == 0 or step == steps:
                    run.log(step, {"loss": loss, "learning_rate": rate, "grad_norm": float(norm), "tokens": tokens})
                if validate and self.evaluate_every and step % self.evaluate_every == 0:
                    with summed_loss.paused():
                        run.log(step, {f"validation/{name}": value for name, value in validate().items()})
                if step % save_every == 0 and step < steps:
                    state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
                    run.save(step, accelerator.unwrap_model(model), state, self.keep)
        return TrainResult(steps=steps, metrics={"loss": loss})

    def _micro_batches(self, rows: Sequence[Encoded], padded: bool) -> list[list[Encoded]]:
        """The rows of a step by forward pass, rows of like length together."""
        auto = self.micro_batch_size == "auto"
        tokens = AUTO_MICRO_BATCH_TOKENS if auto else 2**62
        groups = batching.chunks(batching.lengths(rows), tokens, None if auto else int(self.micro_batch_size), padded)
        return [[rows[at] for at in group] for group in groups]

    def _optimizer(self, model: nn.Module, learning_rate: float) -> Optimizer:
        module, _, name = OPTIMIZERS[self.optimizer].partition(":")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        make = getattr(importlib.import_module(module), name)
        return make([group for group in groups if group["params"]], lr=learning_rate)

    def _schedule(self, optimizer: Optimizer, steps: int) -> Any:
        from transformers import get_scheduler

        return get_scheduler(
            SCHEDULES[self.schedule],
            optimizer,
            num_warmup_steps=round(self.warmup * steps),
            num_training_steps=steps,
        )


def _shortest_and_longest(rows: Sequence[Encoded]) -> list[Encoded]:
    """Two rows that no other is shorter or longer than: what goes well with them does so with all."""
    by_length = sorted(range(len(rows)), key=batching.lengths(rows).__getitem__)
    return [rows[by_length[0]], rows[by_length[-1]]]


def _check_finite(step: int, loss: float, norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(
            f"step {step}: the loss is {loss} and the gradient's norm {norm}; nothing was learned from this step. "
            "A lower learning rate or max_grad_norm=1.0 usually helps"
        )
