"""What a training step needs of memory, and what is done to keep within what there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs

from tunekit.core.interfaces import Trainer
from tunekit.core.memory.budget import DoesNotFitError
from tunekit.core.model.precision import Precision


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


def settle(held: Precision, plan: Callable[[str], MemoryPlan | None]) -> tuple[Precision, MemoryPlan | None]:
    """In which dtype the base is held, and the plan with it: a smaller one only where nothing else makes a step fit.

    Args:
        held: the dtype that is best while memory suffices.
        plan: plans a step with the base in a dtype; DoesNotFitError where the memory allowed is too little.
    """
    try:
        return held, plan(held.dtype)
    except DoesNotFitError:
        if held.smaller is None:
            raise
    found = plan(held.smaller)
    reason = f"{held.dtype} does not fit into the memory allowed"
    if found:
        found = attrs.evolve(found, choices={**found.choices, "precision": f"{held.smaller}, since {reason}"})
    return Precision(held.smaller, reason), found
