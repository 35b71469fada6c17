"""SFT: supervised fine-tuning, a training loop to be read from top to bottom."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.data import batching
from tunekit.core.data.batching import Order
from tunekit.core.data.codec import Codec, TrainOn
from tunekit.core.evaluation.predicting import pad_id
from tunekit.core.fields import at_least, between, did_you_mean, positive
from tunekit.core.interfaces import Encoded, Example, Trainer, TrainResult
from tunekit.core.run.checkpoint import checksums
from tunekit.core.run.signals import asked_to_stop
from tunekit.core.training import rows_loss
from tunekit.core.training.parallel import started
from tunekit.core.training.rows_loss import RowsLoss
from tunekit.errors import ConfigError, NotSupported, TrainingError
from tunekit.plugins.trainers import optimization
from tunekit.plugins.trainers.micro_batches import Limits, Share, learn, smallest
from tunekit.plugins.trainers.so_far import WAYS_OUT, SoFar, what_is_not_finite

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from tunekit.core.run.files import RunLog


@attrs.frozen(kw_only=True)
class SFT(Trainer):
    """Supervised fine-tuning: next-token cross-entropy on what the assistant says.

    The loss of a step is the mean over all supervised tokens of its `batch_size` rows. How they are split into forward
    passes, and among processes, never changes it. Where the memory does not suffice for a forward pass, the step begins
    again with half as many rows in each; the log and the result say so.

    Args:
        epochs: passes over the training rows; ignored where max_steps is given.
        max_steps: optimizer steps; None lets epochs decide.
        learning_rate: the highest, reached after the warm-up; None takes the adapter method's own.
        schedule: how the learning rate falls: "cosine", "linear", "constant" or "inverse-sqrt".
        warmup: share of the steps over which the learning rate rises from 0.
        optimizer: "adamw", "adamw-8bit" (bitsandbytes), "adafactor" or "sgd".
        weight_decay: decay of matrices per step, times the learning rate; vectors (biases, norms) are left alone.
        max_grad_norm: longer gradients are scaled down to this length; `float("inf")` for never.
        batch_size: rows an optimizer step learns from, over all processes.
        micro_batch_size: rows in one forward pass, at most, or "auto"; a matter of memory and speed alone.
        padding_free: rows of a forward pass are laid end to end, each attending to itself alone, where the model gives
            the same loss so; it is tried on rows of yours, and the log says why where it cannot be.
        chunked_loss: logits are made only where a token is supervised and some tokens at a time, their gradient with
            them, where the model gives the same loss so.
        gradient_checkpointing: activations are computed again in the backward pass instead of kept: much less memory
            for a third more time, and the same gradient.
        max_length: longest row in tokens; None means the model's context length.
        train_on: "assistant" (all its turns), "last" (its last turn) or "all" (every token).
        on_long: "error", "drop" or "truncate" rows that are longer than max_length, or "split" them into windows, which
            works for plain texts; counted in plan and result.
        order: rows "shuffled" anew each epoch by the seed, or "as-given".
        save_every: steps between checkpoints; None saves at the end of each epoch.
        save_minutes: a checkpoint is also written when the last one is so many minutes old.
        keep: how many checkpoints stay, the newest.
        keep_best: a metric of the evaluators ("perplexity"): the checkpoint of the evaluation where it was best stays
            too, and the result says which step that was. The last step is evaluated as well.
        evaluate_every: steps between evaluations while training; None for none.
        log_every: steps between log lines.
        on_nonfinite: "stop" at a step whose loss or gradient is not finite, with its rows in the error; or "skip" it:
            the parameters do not move, the schedule goes on, and skipped steps are logged and counted in the result.
    """

    name = "sft"
    several_processes = True

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
    gradient_checkpointing: bool = False
    max_length: int | None = attrs.field(default=None, validator=at_least(2))
    train_on: TrainOn = "assistant"
    on_long: Literal["error", "drop", "truncate", "split"] = "error"
    order: Order = "shuffled"
    save_every: int | None = attrs.field(default=None, validator=at_least(1))
    save_minutes: float | None = attrs.field(default=None, validator=positive)
    keep: int = attrs.field(default=2, validator=at_least(1))
    keep_best: str | None = None
    evaluate_every: int | None = attrs.field(default=None, validator=at_least(1))
    log_every: int = attrs.field(default=1, validator=at_least(1))
    on_nonfinite: Literal["stop", "skip"] = "stop"

    def check(self, context: Context) -> None:
        """The optimizer's package must be installed, and what is to be best must be measured."""
        package = optimization.OPTIMIZERS[self.optimizer].partition(".")[0]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{self.optimizer!r} needs {package}: pip install {package}", "SFT.optimizer")
        if self.keep_best and self.keep_best not in context.better:
            raise ConfigError(
                f"no evaluator returns {self.keep_best!r}{did_you_mean(self.keep_best, context.better)}",
                "SFT.keep_best",
            )
        if self.keep_best and not self.evaluate_every:
            raise ConfigError("needs evaluate_every: the steps at which it is measured", "SFT.keep_best")

    def planned_steps(self, rows: int) -> int:
        """Optimizer steps on `rows` rows: max_steps, or whole epochs, the last step of each taking what is left."""
        return self.max_steps or max(1, math.ceil(self.epochs * batching.steps_per_epoch(rows, self.batch_size)))

    def peak_learning_rate(self, context: Context) -> float:
        """The user's learning rate, else the adapter method's."""
        return context.learning_rate if self.learning_rate is None else self.learning_rate

    def checkpoint_bytes(self, model: nn.Module) -> int:
        """Bytes of what is trained and of the optimizer's states; a few kilobytes of names and numbers come on top."""
        trained: int = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return trained + optimization.size(optimization.make(self.optimizer, model, 1.0, self.weight_decay))

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

        if self.keep_best and not validate:
            raise ConfigError("there are no held-out rows to measure it on", "SFT.keep_best")
        steps = self.planned_steps(len(train))
        save_every = self.save_every or batching.steps_per_epoch(len(train), self.batch_size)
        accelerator, processes = Accelerator(cpu=context.device == "cpu", device_placement=False), started()
        peak = self.peak_learning_rate(context)
        share = optimization.schedule(self.schedule, self.warmup, steps)
        optimizer = optimization.make(self.optimizer, model, peak, self.weight_decay)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        so_far = SoFar(limits=Limits.of(self.micro_batch_size))
        if run.resumed:
            so_far = SoFar(**run.resumed.state["trainer"]["so_far"])
            if not so_far.limits.halved:
                so_far.limits = Limits.of(self.micro_batch_size)  # a forced resume may have another
            optimization.restore(optimizer, run.resumed.state["trainer"]["optimizer"])
        summed_loss = self._summed_loss(model, tokenizer, train, run, context)
        # Not wrapped for several processes, which "evaluation_mode" stands for: gradients are added up here.
        model = accelerator.prepare_model(model, evaluation_mode=True)
        optimizer = accelerator.prepare_optimizer(optimizer)
        model.train()
        run.draw(context.seed)  # last: nothing else may draw random numbers

        saved_at = time.monotonic()
        recomputing: AbstractContextManager[None] = nullcontext()
        if self.gradient_checkpointing:
            recomputing = activations_computed_again(accelerator.unwrap_model(model))
        with summed_loss.training(), recomputing, asked_to_stop() as asked:
            for step in range(run.resumed.step + 1 if run.resumed else 1, steps + 1):
                rows = batching.rows_of_step(step, len(train), self.batch_size, context.seed, self.order)
                read = {at: train[at] for at in rows}  # once: rows are in files
                tokens = sum(map(batching.supervised_tokens, read.values()))
                attempt = partial(
                    learn,
                    step,
                    processes.share(rows, batching.lengths(list(read.values()))),
                    read,
                    so_far.limits,
                    padded=not summed_loss.padding_free,
                    loss=partial(_part, summed_loss, model, tokens),
                    backward=accelerator.backward,
                    clear=optimizer.zero_grad,
                )
                shares: list[Share] = processes.together(attempt)
                losses = [one for share in shares for one in share.losses]
                so_far.limits = smallest([share.limits for share in shares])
                for note in [note for share in shares for note in share.notes]:
                    run.note(note)
                # Once a step: on the first process alone, since what all have is added up.
                extra = extra_loss(accelerator.unwrap_model(model)) if processes.is_first else None
                if extra is not None:
                    accelerator.backward(extra)
                processes.add_gradients(trained)
                norm = float(accelerator.clip_grad_norm_(trained, self.max_grad_norm))
                loss = sum(part for part, _ in losses)
                rate = peak * share(step - 1)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                wrong = what_is_not_finite(step, losses, norm, read, tokenizer)
                if wrong and self.on_nonfinite == "stop":
                    raise TrainingError(f"{wrong}. Nothing was learned from this step; {WAYS_OUT}")
                if wrong:
                    so_far.skipped += 1
                    run.note(f"skipped {wrong}")
                    run.log(step, {"skipped": 1, "learning_rate": rate, "tokens": tokens})
                else:
                    so_far.loss = loss
                    optimizer.step()
                    after_step(accelerator.unwrap_model(model), step)
                optimizer.zero_grad()

                if not wrong and (step % self.log_every == 0 or step == steps):
                    run.log(step, {"loss": loss, "learning_rate": rate, "grad_norm": norm, "tokens": tokens})
                is_best = False
                if validate and self._evaluates(step, steps):
                    with summed_loss.paused():
                        measured = validate()
                    run.log(step, {f"validation/{name}": value for name, value in measured.items()})
                    if name := self.keep_best:
                        is_best = so_far.is_best(step, measured[name], context.better[name])
                due = step % save_every == 0 or time.monotonic() - saved_at >= 60 * (self.save_minutes or math.inf)
                # Signals and clocks are of one process; what they ask for, all do at the same step.
                asks = processes.gather((asked.by, due))
                stop, due = next((by for by, _ in asks if by), None), asks[0][1]
                if ((due or is_best) and step < steps) or stop:
                    way = {"padding_free": summed_loss.padding_free, "chunked": summed_loss.chunked}
                    state = {"optimizer": optimizer.state_dict(), "so_far": attrs.asdict(so_far), "loss": way}
                    run.save(step, accelerator.unwrap_model(model), state, self.keep, so_far.best_step)
                    saved_at = time.monotonic()
                if stop:
                    asked.by = stop
                    asked.leave()
        processes.check_same("what was trained", checksums(model) if processes.count > 1 else None)
        return TrainResult(steps=steps, metrics=so_far.metrics(self.keep_best))

    def _summed_loss(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[Encoded],
        run: RunLog,
        context: Context,
    ) -> RowsLoss:
        """The way to the loss; a resumed run goes the way it went before, to the last bit."""
        fill = pad_id(tokenizer)
        if run.resumed:
            way = run.resumed.state["trainer"]["loss"]
            free, chunked = self.padding_free and way["padding_free"], self.chunked_loss and way["chunked"]
            return RowsLoss(model=model, pad_id=fill, device=context.device, padding_free=free, chunked=chunked)
        found = rows_loss.choose(
            model,
            batching.shortest_and_longest(train),
            fill,
            context.device,
            padding_free=self.padding_free,
            chunked=self.chunked_loss,
        )
        for note in found.notes:
            run.note(note)
        return found

    def _evaluates(self, step: int, steps: int) -> bool:
        """Whether `step` is evaluated; where the best is kept, the last one is, which may be it."""
        if not self.evaluate_every:
            return False
        return step % self.evaluate_every == 0 or (bool(self.keep_best) and step == steps)


def _part(summed_loss: RowsLoss, model: nn.Module, tokens: int, rows: Sequence[Encoded]) -> Tensor:
    """A part of the step's loss. Divided by the tokens of the whole step: every token weighs the same in any split."""
    return summed_loss(model, rows) / tokens


@contextmanager
def activations_computed_again(model: nn.Module) -> Iterator[None]:
    """Within it, training `model` keeps the activations of no layer but its input; NotSupported if it cannot do so."""
    # Transformers has given it the first name of late.
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    try:
        getattr(model, f"{word}_checkpointing_enable")({"use_reentrant": False})
    except (AttributeError, ValueError) as error:
        raise NotSupported(f"{type(model).__name__} knows no gradient checkpointing: {error}") from None
    try:
        yield
    finally:
        getattr(model, f"{word}_checkpointing_disable")()
