"""SFT: supervised fine-tuning; its fields. The loop is `loop.py`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.data import batching
from tunekit.core.data.batching import Order
from tunekit.core.data.codec import Codec, TrainOn
from tunekit.core.fields import at_least, between, did_you_mean, positive
from tunekit.core.interfaces import Encoded, Example, Quantizer, Trainer
from tunekit.core.outcomes import TrainResult
from tunekit.core.training.parallel import asks_for_pieces
from tunekit.errors import ConfigError
from tunekit.plugins.trainers import optimization

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from tunekit.core.memory.memory_plan import MemoryPlan
    from tunekit.core.run.run_log import RunLog


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
        optimizer: "adamw", "adamw-8bit" (bitsandbytes), "adafactor" or "sgd". On a GPU, a step waits for it once; with
            torch's "adafactor" twice more for each tensor that is trained, with "adamw-8bit" once more.
        weight_decay: decay of matrices per step, times the learning rate; vectors (biases, norms) are left alone.
        max_grad_norm: longer gradients are scaled down to this length; `float("inf")` for never.
        batch_size: rows an optimizer step learns from, over all processes.
        micro_batch_size: rows in one forward pass, at most, or "auto"; a matter of memory and speed alone.
        packing: tokens that the rows of a step are packed into for one forward pass, in the place of micro_batch_size:
            best-fit decreasing; a step has its batch_size rows all the same, and its loss. One row may be longer. None
            for 4,096 with "auto", and fewer where the memory asks for it.
        padding_free: rows of a forward pass are laid end to end, each attending to itself alone, where the model gives
            the same loss so; it is tried on your shortest and longest row (on excerpts of 32 tokens, unless the model
            has a window or the like that more tokens go beyond), and the log says why where it cannot be.
        shared_prefix: what rows of a forward pass begin with alike, a system prompt or a document, is computed once for
            all of them where that pays (rows of the first step tell), nothing is dropped at random, and the model gives
            the same loss so; rows are without padding then. The gradient is the same.
        chunked_loss: logits are made only where a token is supervised and some tokens at a time, their gradient with
            them, where the model gives the same loss so.
        parallel: what several processes have of the model: "replicated", all of it in each; or "sharded", a piece each,
            for a model that does not fit (FSDP2). An accelerate configuration with FSDP 2 asks for "sharded" as well.
        lean: layers adapted by LoRA, AdaLoRA, IA3, LoHa and LoKr compute while training what PEFT's do, with less work
            and, in a gated MLP over LoRA and in normalizations, fewer activations, where the model's loss and gradient
            stay the same so; tried as well. Files and evaluations are as without.
        keep_dequantized: GiB of the weights in 4 or 8 bits that lean layers keep dequantized, to multiply with them
            again and again; 0 for none, "auto" for half of the memory that a step leaves, on CUDA at most what lets the
            run take as much as over half precision. If the memory does not suffice after all, they are the first to go.
        compile: layers of the model are compiled by torch.compile while it is trained, which costs about a minute, less
            where a run of the same shapes went before, and needs a C++ compiler on the CPU; it is tried first as
            padding_free is. "auto" does so from 1,000 planned steps on. Compiled layers are PEFT's, not lean.
        prefetch: the rows of the next step are read, laid out and sent to the GPU by a thread while this step computes.
        cache_frozen_layers: hidden states before the lowest trained layer (of `LastLayers`, say) are computed once for
            each row and kept in the run directory while the run lasts; refused where that cannot be done.
        gradient_checkpointing: activations are computed again in the backward pass instead of kept: much less memory
            for a third more time, and the same gradient. True for all layers, a number for the first so many that keep
            anything, "auto" for as few as the memory asks for: none while it suffices.
        memory: GiB that training may take, its model included; None for what is free when the run begins. It is what
            "auto" goes by, and where even that is too much, a float32 base nobody asked for is held in bfloat16; a step
            that does not fit into it is refused before any weights are loaded.
        max_length: longest row in tokens; None means the model's context length.
        train_on: "assistant" (all its turns), "last" (its last turn) or "all" (every token).
        on_long: "error", "drop" or "truncate" rows that are longer than max_length, or "split" them into windows, which
            works for plain texts; counted in plan and result.
        order: rows "shuffled" anew each epoch by the seed; "as-given"; or "by-length": rows of like length share a
            step and the steps are shuffled, which pads less, but makes other batches than chance would.
        save_every: steps between checkpoints; None saves at the end of each epoch.
        save_minutes: a checkpoint is also written when the last one is so many minutes old.
        keep: how many checkpoints stay, the newest.
        keep_best: a metric of the evaluators ("perplexity"): the checkpoint of the evaluation where it was best stays
            too, and the result says which step that was. The last step is evaluated as well.
        restore_best: the tuned model is that of the best evaluation by keep_best, not that of the last step: it is what
            is measured at the end, saved and exported. AdaLoRA's must have cut its ranks down.
        background_saving: a checkpoint is copied while training waits, and written while it goes on, where the memory
            has room for the copy. What a stopped run saves last is waited for.
        evaluate_every: steps between evaluations while training; None for none.
        patience: so many evaluations in a row without a better `keep_best`, and the run stops early; None for never.
            The tuned model is that of the last step, unless restore_best has it otherwise.
        stop_beyond: by metric of the evaluators (`{"forgetting": 0.2}`) a limit: at the first evaluation that is worse,
            the run stops early.
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
    packing: int | None = attrs.field(default=None, validator=at_least(1))
    padding_free: bool = True
    shared_prefix: bool = True
    chunked_loss: bool = True
    parallel: Literal["replicated", "sharded"] = "replicated"
    lean: bool = True
    keep_dequantized: float | Literal["auto"] = attrs.field(default="auto", validator=at_least(0))
    compile: bool | Literal["auto"] = False
    prefetch: bool = True
    cache_frozen_layers: bool = False
    gradient_checkpointing: bool | int | Literal["auto"] = attrs.field(default="auto", validator=at_least(0))
    memory: float | None = attrs.field(default=None, validator=[positive, between(0, math.inf)])
    max_length: int | None = attrs.field(default=None, validator=at_least(2))
    train_on: TrainOn = "assistant"
    on_long: Literal["error", "drop", "truncate", "split"] = "error"
    order: Order = "shuffled"
    save_every: int | None = attrs.field(default=None, validator=at_least(1))
    save_minutes: float | None = attrs.field(default=None, validator=positive)
    keep: int = attrs.field(default=2, validator=at_least(1))
    keep_best: str | None = None
    restore_best: bool = False
    background_saving: bool = True
    evaluate_every: int | None = attrs.field(default=None, validator=at_least(1))
    patience: int | None = attrs.field(default=None, validator=at_least(1))
    stop_beyond: Mapping[str, float] | None = None
    log_every: int = attrs.field(default=1, validator=at_least(1))
    on_nonfinite: Literal["stop", "skip"] = "stop"

    @property
    def sharded(self) -> bool:
        """By the field, or by the launcher's configuration."""
        return self.parallel == "sharded" or asks_for_pieces()

    def check(self, context: Context) -> None:
        """The optimizer's package must be installed, and what is to be best must be measured."""
        if self.sharded and self.optimizer not in optimization.SHARDED:
            able = " or ".join(repr(name) for name in optimization.SHARDED)
            raise ConfigError(f"{self.optimizer!r} needs whole parameters; for pieces take {able}", "SFT.optimizer")
        package = optimization.OPTIMIZERS[self.optimizer].partition(".")[0]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{self.optimizer!r} needs {package}: pip install {package}", "SFT.optimizer")
        if self.compile and self.cache_frozen_layers:
            raise ConfigError("not together with compile; leave one of them out", "SFT.cache_frozen_layers")
        if self.packing and self.micro_batch_size != "auto":
            raise ConfigError("takes the place of micro_batch_size; leave one of them out", "SFT.packing")
        named = {"keep_best": [self.keep_best] if self.keep_best else [], "stop_beyond": self.stop_beyond or ()}
        for field, metrics in named.items():
            for name in metrics:
                if name not in context.better:
                    raise ConfigError(
                        f"no evaluator returns {name!r}{did_you_mean(name, context.better)}", f"SFT.{field}"
                    )
            if metrics and not self.evaluate_every:
                raise ConfigError("needs evaluate_every: the steps at which it is measured", f"SFT.{field}")
        if self.patience and not self.keep_best:
            raise ConfigError("needs keep_best: the metric that has to get better", "SFT.patience")
        if self.restore_best and not self.keep_best:
            raise ConfigError("needs keep_best: the metric by which it is the best", "SFT.restore_best")

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

    def checkpoints_kept(self) -> int:
        """Those that stay, the best, and the one that is being written."""
        return self.keep + (self.keep_best is not None) + 1

    @property
    def recomputed_layers(self) -> int | None:
        """The first so many layers are recomputed in the backward pass; None for all of them."""
        asked = self.gradient_checkpointing
        return 0 if asked == "auto" else {True: None, False: 0}[asked] if isinstance(asked, bool) else int(asked)

    @property
    def kept_bytes(self) -> int | None:
        """Bytes of dequantized weights to keep; None where that is left open."""
        return None if self.keep_dequantized == "auto" else int(self.keep_dequantized * 2**30)

    def plan_memory(
        self,
        model: Callable[[], nn.Module],
        train: Sequence[Encoded],
        tokenizer: PreTrainedTokenizerBase,
        quantizer: Quantizer | None,
        context: Context,
        *,
        unless_roomy: PretrainedConfig | None = None,
    ) -> MemoryPlan | None:
        """Rehearses the step with the most tokens at once; see `Trainer.plan_memory`. None for a model in pieces."""
        from tunekit.plugins.trainers import memory_plan

        if self.parallel == "sharded" or asks_for_pieces():
            return None
        return memory_plan.plan(self, model, train, tokenizer, quantizer, context, unless_roomy)

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
        from tunekit.plugins.trainers import loop

        if (self.keep_best or self.stop_beyond) and not validate:
            field = "keep_best" if self.keep_best else "stop_beyond"
            raise ConfigError("there are no held-out rows to measure it on", f"SFT.{field}")
        return loop.fit(
            self,
            model,
            tokenizer,
            train,
            after_step=after_step,
            extra_loss=extra_loss,
            validate=validate,
            run=run,
            context=context,
        )
