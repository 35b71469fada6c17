"""What training and evaluating return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class TrainResult:
    """What `Trainer.fit` returns.

    Args:
        steps: optimizer steps taken, those before a resume included.
        metrics: figures about the training itself, by name.
        notes: what else there is to say, by name; under "stopped" why it took fewer steps than planned.
    """

    steps: int
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    notes: Mapping[str, str] = attrs.field(factory=dict)


class Measured(dict[str, float]):
    """Metrics with what stands behind them: for an evaluator to return that has more to say than numbers.

    A plain mapping of metrics wherever one is expected; the rest is kept in `evaluations/` of the run directory.

    Args:
        metrics: one finite number for each name in `better`.
        scores: for each metric that is a mean over rows, the score of each row, in the order of the rows: intervals and
            paired tests are made of them.
        weights: for each such metric whose mean is weighted, the weight of each row (its tokens, for instance).
        details: JSON values by name, such as a confusion matrix or answers.
    """

    def __init__(
        self,
        metrics: Mapping[str, float],
        *,
        scores: Mapping[str, Sequence[float]] = MappingProxyType({}),
        weights: Mapping[str, Sequence[float]] = MappingProxyType({}),
        details: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__(metrics)
        self.scores, self.weights, self.details = dict(scores), dict(weights), dict(details)
