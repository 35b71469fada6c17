"""What a run will do, known before it starts: steps and tokens from the real rows, parameters from the meta device."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from tunekit.core.common.table import html_table, table

if TYPE_CHECKING:
    from torch import nn


@attrs.frozen(kw_only=True)
class Plan:
    """What `Pipeline.plan` returns; prints as a table.

    Args:
        rows: training rows.
        validation_rows: held-out rows.
        steps: optimizer steps.
        learning_rate: the highest, the method's own where the trainer leaves it open; None if the trainer does not say.
        tokens: tokens in one pass over the training rows.
        supervised_tokens: those of them that carry loss.
        longest: tokens of the longest training row.
        trainable_parameters: parameters that training changes.
        total_parameters: all parameters, trainable ones included.
        precision: the dtype of the base's weights, and why.
        checkpoint: bytes of one on disk; None if the trainer does not say.
        checkpoints: how many of them are on disk at once, at most.
        memory: bytes by part when a training step needs the most; evaluations are not in it. Where the trainer does not
            say, what is held throughout.
        available: bytes there are for it; None if the trainer does not say.
        choices: what the trainer has settled to keep within them, and why.
        changed: rows dropped or cut, by reason.
    """

    rows: int
    validation_rows: int
    steps: int
    learning_rate: float | None
    tokens: int
    supervised_tokens: int
    longest: int
    trainable_parameters: int
    total_parameters: int
    precision: str
    checkpoint: int | None
    checkpoints: int
    memory: Mapping[str, int]
    available: int | None
    choices: Mapping[str, str]
    changed: Mapping[str, int]

    def __str__(self) -> str:
        return table(["plan", ""], self._lines())

    def _repr_html_(self) -> str:
        return html_table(["plan", ""], self._lines())

    def _lines(self) -> list[list[str]]:
        share = self.trainable_parameters / self.total_parameters
        return [
            ["training rows", f"{self.rows:,}"],
            [
                "validation rows",
                f"{self.validation_rows:,}" if self.validation_rows else "none: nothing is evaluated",
            ],
            ["optimizer steps", f"{self.steps:,}"],
            ["learning rate", "the trainer's own" if self.learning_rate is None else f"{self.learning_rate:g} at most"],
            ["tokens in one pass", f"{self.tokens:,}, the longest row {self.longest:,}"],
            ["supervised tokens", f"{self.supervised_tokens:,} ({self.supervised_tokens / self.tokens:.1%})"],
            [
                "trainable parameters",
                f"{self.trainable_parameters:,} of {self.total_parameters:,} ({share:.2%})",
            ],
            ["base weights", self.precision],
            *([] if self.checkpoint is None else [["a checkpoint", f"{self.checkpoint / 2**20:,.1f} MiB on disk"]]),
            *([] if self.checkpoint is None else [["all checkpoints", self._all_checkpoints(self.checkpoint)]]),
            *([f"memory: {part}", f"{size / 2**20:,.1f} MiB"] for part, size in self.memory.items() if size),
            ["memory: all", self._all_memory()],
            *([name, choice] for name, choice in self.choices.items()),
            *([reason, f"{count:,} row{'s' * (count != 1)}"] for reason, count in self.changed.items()),
        ]

    def _all_checkpoints(self, one: int) -> str:
        return f"{self.checkpoints * one / 2**20:,.1f} MiB on disk, {self.checkpoints} at most"

    def _all_memory(self) -> str:
        needed = f"{sum(self.memory.values()) / 2**20:,.1f} MiB"
        if self.available is None:
            return f"{needed}, and what activations take"
        return f"{needed} in a training step, of {self.available / 2**20:,.1f} MiB"


def count_parameters(model: "nn.Module") -> tuple[int, int]:
    """Trainable and all parameters of a model, shared ones counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def standing_memory(model: "nn.Module") -> dict[str, int]:
    """Bytes held throughout training by part, the base as it is before quantization.

    Args:
        model: the model with the method attached; on the meta device will do.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    return {"frozen weights": frozen, "trained weights": trained, "gradients": trained}
