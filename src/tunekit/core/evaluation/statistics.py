"""How sure a mean over rows is: bootstrap intervals, and the paired bootstrap test of one model against another.

Rows are drawn with replacement, as many as there are, again and again; what the statistic does over these draws says
how much of it is the luck of which rows were measured (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
chapters 13 and 16). Intervals are percentile intervals. The draws come from a generator of their own, so the same seed
gives the same numbers and no other random state moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVEL = 0.95
"""The share of draws within an interval."""
RESAMPLES = 1000
DRAWN_AT_ONCE = 1 << 20
"""Row numbers held at a time."""


class Interval(NamedTuple):
    """Where a figure would lie with other rows of the same kind: within `low` and `high` in 95 of 100 draws."""

    low: float
    high: float


class Difference(NamedTuple):
    """How much greater the second of two figures is, its interval, and how likely so great a difference is by luck."""

    value: float
    low: float
    high: float
    p: float


def bootstrap(
    statistic: Callable[[NDArray[Any]], float],
    rows: int,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """The percentile interval of any statistic.

    Args:
        statistic: the figure of the rows with these numbers, shape (rows,), some of which come twice.
        rows: how many rows there are.
        seed: of the draws.
        resamples: draws.
        level: the share of draws within the interval.
    """
    return _interval([statistic(draw) for some in _draws(rows, resamples, seed) for draw in some], level)


def mean_interval(
    scores: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """The percentile interval of the mean of `scores`, one a row, weighted by `weights` (all alike: None)."""
    return _interval(_means(scores, weights, seed, resamples), level)


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Difference:
    """The mean of `second` less that of `first`, scores of the same rows in the same order, and the paired test of it.

    Both are drawn together, so what makes a row hard for both cancels (Koehn, Statistical Significance Tests for
    Machine Translation Evaluation, 2004). `p` is two-sided: twice the share of draws in which the difference is zero or
    has the other sign, each count one greater than it was, so that it is never zero.

    Args:
        first: a score a row.
        second: a score of each of the same rows.
        weights: of the rows, the same for both; None for all alike.
        seed: of the draws.
        resamples: draws.
        level: the share of draws within the interval.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} scores: a paired test needs scores of the same rows")
    import numpy as np

    gains = np.subtract(second, first)
    means = _means(gains, weights, seed, resamples)
    against = 1 + min(int((means <= 0).sum()), int((means >= 0).sum()))
    return Difference(
        float(np.average(gains, weights=weights)), *_interval(means, level), min(1.0, 2 * against / (resamples + 1))
    )


def _means(scores: Any, weights: Sequence[float] | None, seed: int, resamples: int) -> NDArray[Any]:
    """The weighted mean of each draw, shape (resamples,)."""
    import numpy as np

    heavy = np.ones(len(scores)) if weights is None else np.asarray(weights, dtype=float)
    sums = np.asarray(scores, dtype=float) * heavy
    return np.concatenate([sums[some].sum(1) / heavy[some].sum(1) for some in _draws(len(sums), resamples, seed)])


def _draws(rows: int, resamples: int, seed: int) -> Iterator[NDArray[Any]]:
    """Row numbers drawn with replacement, shape (some, rows), until there are `resamples` of them."""
    import numpy as np

    if not rows:
        raise ValueError("no rows to draw from")
    generator = np.random.default_rng(seed)
    at_once = max(1, DRAWN_AT_ONCE // rows)
    for done in range(0, resamples, at_once):
        yield generator.integers(rows, size=(min(at_once, resamples - done), rows))


def _interval(values: Any, level: float) -> Interval:
    import numpy as np

    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Interval(low, high)
