"""How long each method of a comparison is trained: some optimizer steps, or those in which it sees so many tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, count

import attrs

from tunekit.core.data import batching
from tunekit.core.fields import at_least, check_types
from tunekit.core.interfaces import Trainer
from tunekit.errors import ConfigError


@attrs.frozen
class Steps:
    """A budget of optimizer steps, exactly.

    Args:
        count: how many.
    """

    count: int = attrs.field(validator=at_least(1))

    def __attrs_post_init__(self) -> None:
        check_types(self)

    def steps(self, trainer: Trainer, lengths: Sequence[int], seed: int) -> int:
        """The steps themselves."""
        return self.count

    def __str__(self) -> str:
        return f"{self.count:,} steps"


@attrs.frozen
class Tokens:
    """A budget of tokens of training rows, padding not counted: the fewest optimizer steps that reach it.

    Args:
        count: how many, prompts included.
    """

    count: int = attrs.field(validator=at_least(1))

    def __attrs_post_init__(self) -> None:
        check_types(self)

    def steps(self, trainer: Trainer, lengths: Sequence[int], seed: int) -> int:
        """The number of the step with which the rows seen have `count` tokens; see `tokens_of_steps`."""
        per_step = tokens_of_steps(trainer, lengths, seed)
        if per_step is None:
            raise ConfigError(
                f"{trainer.name} does not say which rows make a step, as tk.SFT does by `batch_size` and `order`; "
                "use Steps",
                "compare.budget",
            )
        return next(step for step, tokens in enumerate(accumulate(per_step), start=1) if tokens >= self.count)

    def __str__(self) -> str:
        return f"{self.count:,} tokens"


Budget = Steps | Tokens


@attrs.frozen
class TokensOfSteps:
    """Tokens of the rows of each step, without end; see `tokens_of_steps`."""

    size: int
    order: batching.Order
    lengths: Sequence[int] = attrs.field(repr=False)
    seed: int

    def __iter__(self) -> Iterator[int]:
        chosen = batching.RowOrder(lengths=self.lengths, batch_size=self.size, seed=self.seed, order=self.order)
        for step in count(1):
            yield sum(self.lengths[row] for row in chosen.of_step(step))


def tokens_of_steps(trainer: Trainer, lengths: Sequence[int], seed: int) -> TokensOfSteps | None:
    """Tokens of the rows of each step, without end; None for a trainer without the fields `batch_size` and `order`.

    Args:
        trainer: its steps take rows as `batching.RowOrder` says.
        lengths: tokens of each training row.
        seed: of the run.
    """
    fields = attrs.fields_dict(type(trainer))
    if "batch_size" not in fields or "order" not in fields:
        return None
    return TokensOfSteps(trainer.batch_size, trainer.order, lengths, seed)  # type: ignore[attr-defined]
