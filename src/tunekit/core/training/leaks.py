"""Whether rows that go through a model together change each other: a question that rounding cannot answer.

The loss of a row has a gradient of exactly zero with respect to whatever the model reads in another row's place, or in
that of padding; a state that is handed on from row to row, as recurrent layers and short convolutions have one, gives
it another. That zero is exact in every dtype and on every device. (Replacing the other row's tokens and comparing bits
would not be: a mixture of experts then groups the tokens otherwise, and rounds them otherwise.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs

from tunekit.core.data.codec import IGNORED
from tunekit.core.interfaces import Encoded
from tunekit.core.training.batch import Batch

if TYPE_CHECKING:
    from torch import Size, Tensor, nn

    from tunekit.core.training.rows_loss import RowsLoss

TOKENS = 16
"""Of each row that is asked about: a state that is handed on at all is handed on by a few tokens."""
EXACT = 1e-6
"""Relative difference of two losses in float64 that is rounding alone: they are added up in float32."""


def leak(way: RowsLoss, rows: Sequence[Encoded]) -> str | None:
    """What changes a row of `rows` that is not its own, or what was raised; None if each is as beside any others.

    Args:
        way: to the loss, of a model in evaluation mode, whose parameters get no gradients.
        rows: a few short rows.
    """
    try:
        with way.training():
            reasons = (_changed(way, rows, number) for number in range(len(rows)))
            return next(filter(None, reasons), None)
    except Exception as error:  # whatever a model of somebody else's raises, there is the plain way
        return f"{type(error).__name__}: {error}"


def not_as_alone(way: RowsLoss, rows: Sequence[Encoded]) -> str | None:
    """How far the loss of `rows` together is from that of each alone, in float64; None if it is the same.

    What depends on lengths, as positions that are scaled by the longest row do, no gradient shows. Nor is anything seen
    of a model that float64 is unknown to, or has no room for: then it is left to what is asked besides.
    """
    from tunekit.core.training.float64 import in_float64

    alone = attrs.evolve(way, padding_free=False, apart=True)
    try:
        with in_float64(way.model):
            apart = float(alone(way.model, rows))
            with way.training():
                together = float(way(way.model, rows))
    except Exception:  # see above
        return None
    if abs(together - apart) <= EXACT * abs(apart):
        return None
    return f"their loss is {together:.6g}, and {apart:.6g} one by one"


def parted(rows: Sequence[Encoded], shared: int = 0, before: int = 0) -> list[Encoded]:
    """The first tokens of each row after the `shared` ones that all begin with, and so many `before` these."""
    start = max(0, shared - before)
    return [{name: row[name][start : shared + TOKENS] for name in ("input_ids", "labels")} for row in rows]


def _changed(way: RowsLoss, rows: Sequence[Encoded], number: int) -> str | None:
    """What changes row `number` that is not its own."""
    import torch

    asked = way.batch([_labelled(row, at == number) for at, row in enumerate(rows)])
    with torch.enable_grad(), _read(way.model, asked.inputs["input_ids"].shape) as read:
        gradients = torch.autograd.grad(way.of(way.model, asked), read, allow_unused=True)
    # Not a number is not zero either.
    moving = [gradient.flatten(0, -2).ne(0).any(-1) for gradient in gradients if gradient is not None]
    return _not_its_own(asked, number, set(torch.stack(moving).any(0).nonzero().flatten().tolist()))


def _labelled(row: Encoded, learned: bool) -> Encoded:
    """The row with a loss on all of its tokens, or on none."""
    ids = list(row["input_ids"])
    return {"input_ids": ids, "labels": ids if learned else [IGNORED] * len(ids)}


@contextmanager
def _read(model: nn.Module, shape: Size) -> Iterator[list[Tensor]]:
    """Within it, gathers what `model` reads for tokens of this shape, to be differentiated by."""
    found: list[Tensor] = []

    def watch(_: nn.Module, __: object, embedded: Tensor) -> Tensor | None:
        if embedded.shape[:-1] != shape:
            return None
        found.append(embedded.detach().requires_grad_())
        return found[-1].clone()  # some models write into what they read

    hook = model.get_input_embeddings().register_forward_hook(watch)
    try:
        yield found
    finally:
        hook.remove()


def _not_its_own(batch: Batch, number: int, changing: set[int]) -> str | None:
    """Which of the places `changing` the loss of row `number` are not of this row, in words."""
    places = [{batch.place(at, token) for token in range(len(row["input_ids"]))} for at, row in enumerate(batch.rows)]
    foreign = changing - places[number]
    if any(foreign & found for found in places[:number]):
        return "a row changes the row after it"
    if any(foreign & found for found in places[number:]):
        return "a row changes the row before it"
    return "padding changes a row" if foreign else None
