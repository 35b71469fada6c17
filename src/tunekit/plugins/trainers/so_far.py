"""What a run of SFT knows of the steps it has taken, and what it says of one that it cannot learn from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.interfaces import Encoded
from tunekit.errors import TrainingError
from tunekit.plugins.trainers.micro_batches import Limits

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from tunekit.core.run.run_log import RunLog
    from tunekit.plugins.trainers.sft import SFT

SHOWN = 16
"""So many rows are named in an error."""
WAYS_OUT = "a lower learning rate or max_grad_norm=1.0 usually helps"


def _as_limits(value: Limits | Mapping[str, Any]) -> Limits:
    """The limits themselves; from a checkpoint, what they are made of."""
    return value if isinstance(value, Limits) else Limits(**value)


@attrs.define(kw_only=True)
class SoFar:
    """What a run knows of the steps it has taken; a part of its checkpoints.

    Args:
        loss: of the last step that was learned from.
        skipped: steps that were not.
        best_step: the step of the best evaluation; None before the first.
        best: what was measured there.
        waited: evaluations since then that were no better.
        stopped_at: the last step, where it is not the last of those planned.
        stopped: why it is, in words.
        limits: of a forward pass.
        recomputed: layers that are computed again in the backward pass, the first so many; None for all.
        kept_bytes: what dequantized weights may take; None for a share of what is free.
    """

    loss: float | None = None
    skipped: int = 0
    best_step: int | None = None
    best: float | None = None
    waited: int = 0
    stopped_at: int | None = None
    stopped: str | None = None
    limits: Limits = attrs.field(factory=Limits, converter=_as_limits)
    recomputed: int | None = 0
    kept_bytes: int | None = None

    @classmethod
    def resumed(cls, state: Mapping[str, Any], sft: SFT) -> SoFar:
        """What a checkpoint knows; of what a trainer leaves open, what was settled when the run began."""
        found = cls(**state)
        found.limits = found.limits.resumed(Limits.of(sft))
        if sft.gradient_checkpointing != "auto":
            found.recomputed = sft.recomputed_layers
        if sft.kept_bytes is not None:
            found.kept_bytes = sft.kept_bytes
        return found

    def is_best(self, sft: SFT, step: int, measured: Mapping[str, float], context: Context) -> bool:
        """Whether what was measured at `step` is better by `keep_best` than all before; if so it is noted.

        Where the best becomes the tuned model, steps before the method may end do not count: they could not be saved.
        """
        name = sft.keep_best
        if name is None or (sft.restore_best and step < context.earliest_end):
            return False
        value, better = measured[name], context.better[name]
        if self.best is not None and not _beats(value, self.best, better):
            self.waited += 1
            return False
        self.best_step, self.best, self.waited = step, value, 0
        return True

    def stops(self, sft: SFT, step: int, measured: Mapping[str, float], context: Context) -> bool:
        """Whether `step`, whose evaluation was noted by `is_best`, is the last though more are planned; noted if so.

        Args:
            sft: says when.
            step: its number.
            measured: at this step, by metric.
            context: which direction of a metric is better, and the step before which the method must not end.
        """
        reasons = [
            f"{name} is {measured[name]:.6g}, beyond the limit of {limit:g}"
            for name, limit in (sft.stop_beyond or {}).items()
            if _beats(limit, measured[name], context.better[name])
        ]
        if sft.patience is not None and self.waited >= sft.patience:
            reasons.append(
                f"{self.waited} evaluations brought no better {sft.keep_best} than {self.best:.6g} at step "
                f"{self.best_step}"
            )
        if not reasons or step < context.earliest_end:
            return False
        self.stopped_at, self.stopped = step, f"stopped early after step {step}: {'; '.join(reasons)}"
        return True

    def restore_best(self, sft: SFT, last: int, run: RunLog, model: nn.Module) -> dict[str, str]:
        """Make `model` that of the best evaluation, where that is asked for and another step was the `last`.

        Returns what is to be noted about it.
        """
        if not sft.restore_best or self.best_step is None or self.best_step == last:
            return {}
        run.restore(self.best_step, model)
        said = f"the tuned model is that of step {self.best_step}, with the best {sft.keep_best}, {self.best:.6g}"
        return {"restored": said}

    @property
    def notes(self) -> dict[str, str]:
        """Why the run stopped early, if it did."""
        return {"stopped": self.stopped} if self.stopped else {}

    def metrics(self, keep_best: str | None) -> dict[str, float]:
        """What the result says; TrainingError if no step was learned from."""
        if self.loss is None:
            raise TrainingError(f"all {self.skipped} steps were skipped: no loss was finite; {WAYS_OUT}")
        found: dict[str, float] = {"loss": self.loss, "skipped_steps": self.skipped}
        if self.limits.halved:
            found["out_of_memory"] = self.limits.halved
        if self.best_step is not None and self.best is not None:
            found |= {"best_step": self.best_step, f"best_{keep_best}": self.best}
        return found


def _beats(value: float, other: float, better: Literal["min", "max"]) -> bool:
    return value < other if better == "min" else value > other


def what_is_not_finite(
    step: int,
    losses: Sequence[tuple[float, Sequence[int]]],
    norm: float,
    train: Mapping[int, Encoded],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """The step and the rows whose loss or gradient is not finite, in words; empty if all is well.

    Args:
        step: its number.
        losses: of each forward pass, with the places of its rows in the training data.
        norm: of the gradient of the whole step.
        train: the rows of the step, by place.
        tokenizer: to show how the rows begin.
    """
    bad = [at for loss, rows in losses if not math.isfinite(loss) for at in rows]
    if not bad and math.isfinite(norm):
        return ""
    rows = sorted(bad or [at for _, rows in losses for at in rows])
    numbers = ", ".join(str(at + 1) for at in rows[:SHOWN]) + (", ..." if len(rows) > SHOWN else "")
    first = repr(tokenizer.decode(list(train[rows[0]]["input_ids"][:16])))
    value = next((loss for loss, _ in losses if not math.isfinite(loss)), norm)
    what = "loss" if bad else "norm of the gradient"
    return (
        f"step {step}: the {what} is {value} on the encoded training rows {numbers}; row {rows[0] + 1} begins {first}"
    )
