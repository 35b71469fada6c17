"""How long each method of a comparison is trained: some optimizer steps, tokens, or minutes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import attrs

from tunekit.core.fields import at_least, between, check_types, positive
from tunekit.core.interfaces import Trainer
from tunekit.core.run.gauge import tokens_of_steps
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


@attrs.frozen
class Minutes:
    """A budget of time: the steps that fit into so many minutes of training, by the speed of each method on a probe.

    The schedule of the learning rate and some methods must know the number of steps before the first one, so time
    cannot simply run out. Each method is first trained for a few steps, which are thrown away; the tokens a second of
    those are the `Tokens` it gets. What the training then took is measured, too.

    Args:
        count: how many, of training: loading, evaluations and checkpoints come on top.
    """

    count: float = attrs.field(validator=[positive, between(0, math.inf)])

    def __attrs_post_init__(self) -> None:
        check_types(self)

    def tokens(self, tokens_per_second: float) -> Tokens:
        """What is learned from in this time at this speed."""
        return Tokens(max(1, round(60 * self.count * tokens_per_second)))

    def __str__(self) -> str:
        return f"{self.count:g} minute{'s' * (self.count != 1)} of training"


Budget = Steps | Tokens | Minutes
