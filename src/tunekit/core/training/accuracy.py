"""Whether one way to a loss is as accurate as another: by the error of each against float64.

Two ways that are both right differ by what both are off, which no number of digits tells beforehand: in bfloat16 single
gradients differ by a tenth. So the plain way is the measure: a way is right that is hardly further from the truth.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import attrs

from tunekit.core.evaluation.predicting import dropping_nothing
from tunekit.core.interfaces import Encoded
from tunekit.core.lean.trial import stirred, training
from tunekit.core.model.masters import computing_dtype

if TYPE_CHECKING:
    from torch import Tensor, nn

WHOLE = 2.0
"""How many times the error of the plain way that of all gradients together may be.

Of the built-in methods over tiny and trained models, in float32, bfloat16, NF4 and Int8, ways that round no more often
than the plain one had 0.8 to 1.6 times its error, 1.0 in the mean; a lean forward that was made to round three times
as much had 2.2.
"""
EACH = 5.0
"""The same of one gradient, which may be of few numbers; of what is right it is 3.3 at most."""
LOSS = 0.5
"""The relative error of a loss, which is one number, may be so much of that of the gradients; found is 0.3 at most."""

LOOKED_AT = 1 << 24
"""Numbers that are trained and whose gradients are looked at, at most: 64 MiB of them each time."""
TINY = sys.float_info.min
"""For what is divided by."""


@attrs.frozen
class Found:
    """A loss, and its gradients by the names of what they are of."""

    loss: float
    gradients: Mapping[str, Tensor]


@attrs.frozen
class Error:
    """How far something is from what it is in float64, relative to its size.

    Args:
        of: what it is, in words.
        error: of the way that is asked about.
        plain: of the plain way.
        bound: up to which a way is right.
    """

    of: str
    error: float
    plain: float
    bound: float

    @property
    def beyond(self) -> float:
        """How many times its bound it is; what is not a number is beyond any."""
        times = self.error / self.bound
        return math.inf if math.isnan(times) else times

    @property
    def measured(self) -> tuple[float, float]:
        """The error, and the bound that it is to keep to."""
        return self.error, self.bound

    def __str__(self) -> str:
        return f"the error of {self.of} is {self.error:.2g} so, and {self.plain:.2g} plainly"


@attrs.frozen(eq=False)
class Measure:
    """A loss and its gradients by the plain way and in float64: what other ways to them are measured by.

    Everything is computed with trained tensors moved from where they start, since many start at zero, which hides
    mistakes; and without dropping anything at random. Afterwards the model is as it was.

    Args:
        model: the model.
        wanted: what the gradients are of, by name.
        plain: the loss and gradients by the plain way.
        true: the same in float64.
    """

    model: nn.Module
    wanted: Mapping[str, Tensor]
    plain: Found
    true: Found

    @classmethod
    def of(cls, model: nn.Module, plainly: Callable[[], Tensor], wanted: Mapping[str, Tensor]) -> Measure:
        """That of `plainly`, a loss of `model`."""
        from tunekit.core.training.float64 import in_float64

        plain = _find(model, plainly, wanted)
        with in_float64(model):
            true = _find(model, plainly, wanted)
        return cls(model, wanted, plain, true)

    def worst(self, loss: Callable[[], Tensor]) -> Error:
        """The error of `loss`, or of a gradient of it, that comes closest to its bound, or is furthest beyond."""
        return worst(_find(self.model, loss, self.wanted), self.plain, self.true, rounding(self.model))


def _find(model: nn.Module, loss: Callable[[], Tensor], wanted: Mapping[str, Tensor]) -> Found:
    import torch

    tensors = list(wanted.values())
    with training(model), dropping_nothing(model), stirred(tensors), torch.enable_grad():
        found = loss()
        gradients = torch.autograd.grad(found, tensors, materialize_grads=True)
    return Found(float(found.detach()), dict(zip(wanted, gradients, strict=True)))


def rounding(model: nn.Module) -> float:
    """The distance of 1 from the next number, in the dtype that `model` computes in."""
    import torch

    return float(torch.finfo(computing_dtype(model)).eps)


def worst(found: Found, plain: Found, true: Found, rounding: float) -> Error:
    """Which error of the loss and the gradients that were `found` comes closest to its bound, or is furthest beyond.

    Args:
        found: by the way that is asked about.
        plain: by the plain way.
        true: in float64.
        rounding: of what is computed in; so much is no error.
    """
    lengths = {name: float(gradient.double().norm()) for name, gradient in true.gradients.items()}
    whole = max(_together(lengths.values()), TINY)
    off, plainly = _errors(found, true), _errors(plain, true)
    level = max(_together(plainly.values()) / whole, rounding / 4)  # no less than the last rounding of each number
    errors = [Error("the gradient", _together(off.values()) / whole, level, WHOLE * level)]
    for name, length in lengths.items():
        # Little beside the whole gradient, it counts as long as if it had its share: what is left of larger numbers
        # that cancel has their errors.
        size = max(length, whole / len(lengths) * rounding)
        usual = max(plainly[name] / size, level)
        errors.append(Error(f"the gradient of {name}", off[name] / size, plainly[name] / size, EACH * usual))
    size = max(abs(true.loss), rounding)
    error, usual = (abs(one.loss - true.loss) / size for one in (found, plain))
    errors.append(Error("the loss", error, usual, max(WHOLE * usual, LOSS * level)))
    return max(errors, key=lambda each: each.beyond)


def _errors(found: Found, true: Found) -> dict[str, float]:
    """The lengths of the differences of all gradients from the true ones, by name."""
    return {
        name: float((found.gradients[name].double() - gradient.double()).norm())
        for name, gradient in true.gradients.items()
    }


def _together(lengths: Iterable[float]) -> float:
    """The length of a vector whose parts have these."""
    return math.hypot(*lengths)


def trained(parameters: Iterable[tuple[str, nn.Parameter]], most: int) -> dict[str, Tensor]:
    """Those of the named `parameters` that are trained, or the smallest of them, of `most` numbers in all.

    Every layer has small ones, and the gradient of the first goes through all of the others. None where they are pieces
    of parameters that several processes share, of which no gradient can be taken here.
    """
    from torch import nn

    found = [(name, tensor) for name, tensor in parameters if tensor.requires_grad]
    if any(type(tensor) is not nn.Parameter for _, tensor in found):
        return {}
    by_size = sorted(found, key=lambda each: each[1].numel())
    ends = accumulate(tensor.numel() for _, tensor in by_size)
    taken = {name for (name, _), end in zip(by_size, ends, strict=True) if end <= most}
    return {name: tensor for name, tensor in found if name in taken}


class Way(Protocol):
    """What is asked of a way to the loss of rows; it has a field for each of the ways that it may go at once."""

    model: nn.Module
    notes: Sequence[str]

    def training(self) -> AbstractContextManager[None]:
        """Within it, the model computes as this way needs."""

    def __call__(self, model: nn.Module, rows: Sequence[Encoded]) -> Tensor:
        """The loss of `rows`."""


W = TypeVar("W", bound=Way)


def as_accurate(chosen: W, plainly: W, rows: Sequence[Encoded], names: Mapping[str, str]) -> W:
    """`chosen` without the ways that are less accurate than the plain one, each with a note of it.

    Args:
        chosen: some ways at once.
        plainly: the plain one.
        rows: a few short rows.
        names: the fields that say which ways, and what each is called; one may need those before it.
    """
    model, wanted = chosen.model, trained(chosen.model.named_parameters(), LOOKED_AT)
    ways = [way for way in names if getattr(chosen, way)]
    if not ways or not wanted:
        return chosen
    try:
        measure = Measure.of(model, partial(plainly, model, rows), wanted)
    except Exception as error:  # it has operations that know no float64, or too little memory is left
        note = f"how accurate it is was not measured: {error}"
        return _evolve(chosen, notes=[*chosen.notes, note])

    def reason(way: W) -> str | None:
        try:
            with way.training():
                error = measure.worst(partial(way, model, rows))
        except Exception as raised:  # whatever a model of somebody else's raises, there is the plain way
            return f"{type(raised).__name__}: {raised}"
        return None if error.beyond <= 1 else str(error)

    if not reason(chosen):
        return chosen
    found = _evolve(plainly, notes=chosen.notes)
    for way in ways:
        more = _evolve(found, **{way: True})
        why = reason(more)
        found = _evolve(found, notes=[*found.notes, f"no {names[way]}: {why}"]) if why else more
    return found


def _evolve(way: W, **changes: Any) -> W:
    changed: W = attrs.evolve(way, **changes)  # type: ignore[misc]
    return changed
