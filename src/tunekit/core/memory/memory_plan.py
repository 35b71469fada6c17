"""What a training step needs of memory, and what is done to keep within what there is."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from tunekit.core.interfaces import Trainer


@attrs.frozen(kw_only=True)
class MemoryPlan:
    """What `Trainer.plan_memory` returns: what a training step needs, and how the trainer keeps within what there is.

    Args:
        trainer: the trainer with what it leaves open settled; a run trains with it.
        parts: bytes by part at the moment when they are most.
        budget: bytes there are.
        choices: what was settled, and why, by name; for the plan to show.
    """

    trainer: Trainer
    parts: Mapping[str, int]
    budget: int
    choices: Mapping[str, str] = attrs.field(factory=dict)

    @property
    def notes(self) -> list[str]:
        """The choices as lines of a log."""
        return [f"memory: {name}: {choice}" for name, choice in self.choices.items()]
