"""Logits in float64, how far those of two models are apart, and how far they may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

import attrs

from tunekit.core.evaluation.predicting import dropping_nothing, evaluating
from tunekit.core.training.accuracy import WHOLE, rounding
from tunekit.errors import NotSupported

if TYPE_CHECKING:
    from torch import Tensor, nn

FLOAT32 = 2.0**-23
"""The distance of 1 from the next number in float32, which whatever is trained is held in."""
SEVERAL = 16
"""Roundings that are no error: what adds up in float32 has as many."""


def logits(model: nn.Module, batch: Mapping[str, Tensor], rounded: bool = False) -> Tensor:
    """What `model` predicts for `batch`, (rows, time, vocabulary), in float64, padding set to zero.

    Args:
        model: the model; nothing of it is dropped.
        batch: padded rows, with an attention mask.
        rounded: computed in the model's own dtype, as while it trains.
    """
    from tunekit.core.training.float64 import in_float64

    with evaluating(model), dropping_nothing(model), nullcontext() if rounded else in_float64(model):
        model.train()  # while evaluating, layers in 8 bits round the activations, too
        found: Tensor = model(**batch, use_cache=False).logits
    return found.double() * batch["attention_mask"][:, :, None]


@attrs.frozen
class Accuracy:
    """Logits in float64, and how accurate they are in fewer bits: by that, how far others may be from them.

    Args:
        logits: in float64, of `logits`.
        roundings: how far they are from this in the dtype they train in, in roundings of it.
        rounding: the distance of 1 from the next number in that dtype.
    """

    logits: Tensor
    roundings: float
    rounding: float

    @classmethod
    def of(cls, true: Tensor, rounded: Tensor, rounding: float) -> Accuracy:
        """That of logits that are `true`, and `rounded`."""
        return cls(true, away(rounded, true) / rounding, rounding)

    def bound(self, in_its_dtype: bool) -> float:
        """How far other logits in float64 may be from these.

        Where nothing was rounded to the dtype of the base, all that can be off is what is trained, which is float32.
        """
        if in_its_dtype:
            return WHOLE * max(self.roundings * self.rounding, SEVERAL * FLOAT32)
        return WHOLE * max(self.roundings, SEVERAL) * FLOAT32


def accuracy(model: nn.Module, batch: Mapping[str, Tensor]) -> Accuracy | NotSupported:
    """That of what `model` predicts for `batch`; or why it has none in float64, if it has some in its own dtype."""
    rounded = logits(model, batch, rounded=True)
    try:
        return Accuracy.of(logits(model, batch), rounded, rounding(model))
    except NotSupported as error:
        return error


def measured(found: Accuracy | NotSupported) -> Accuracy:
    """What was found; raises it where it is the reason why there is none."""
    if isinstance(found, NotSupported):
        raise found
    return found


def away(found: Tensor, expected: Tensor) -> float:
    """The largest difference of one row's logits from those expected, as the length of a vector relative to theirs."""
    if found.shape != expected.shape:
        return float("inf")
    lengths = expected.flatten(1).norm(dim=1).clamp_min(1e-12)
    return float(((found - expected).flatten(1).norm(dim=1) / lengths).max())


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors."""
    return float((found.detach().float() - expected.float()).abs().max()) if found.shape == expected.shape else math.inf
