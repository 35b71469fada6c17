"""How the learning rate rises and falls: the schedules of transformers, as functions of the step's number alone.

So a resumed run needs no state of them, and a skipped step is a step. Written here, since `transformers.get_scheduler`
imports PEFT, which takes seconds, and wants an optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

TIMESCALE = 10_000
"""Steps in which "inverse-sqrt" falls by a factor of the root of two, where there is no warm-up to take for it."""


def schedule(name: str, warmup: float, steps: int) -> Callable[[int], float]:
    """The share of the peak learning rate after so many steps.

    Args:
        name: "cosine" and "linear" reach zero after the last step, "inverse-sqrt" falls as 1 / sqrt(steps made), and
            "constant" stays.
        warmup: the share of the steps in which the rate rises from zero, linearly.
        steps: how many there will be.
    """
    rising = round(warmup * steps)
    fall = FALLS[name]

    def share(step: int) -> float:
        return step / rising if step < rising else fall(step - rising, steps - rising, rising)

    return share


def _cosine(step: int, steps: int, rising: int) -> float:
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (step / max(1, steps)))))


def _linear(step: int, steps: int, rising: int) -> float:
    return max(0.0, (steps - step) / max(1, steps))


def _constant(step: int, steps: int, rising: int) -> float:
    return 1.0


def _inverse_sqrt(step: int, steps: int, rising: int) -> float:
    timescale = rising or TIMESCALE
    return 1 / math.sqrt((step + timescale) / timescale)


FALLS: dict[str, Callable[[int, int, int], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "inverse-sqrt": _inverse_sqrt,
}
"""The share after a number of the steps that follow the warm-up, of how many there are, and how many that had."""
