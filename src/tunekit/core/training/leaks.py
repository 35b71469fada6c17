"""Whether rows that go through a model together change each other: a question that rounding cannot answer.

The loss of a row has a gradient of exactly zero with respect to whatever the model reads in another row's place, or in
that of padding; a state that is handed on from row to row, as recurrent layers and short convolutions have one, gives
it another. That zero is exact in every dtype and on every device. (Replacing the other row's tokens and comparing bits
would not be: a mixture of experts then groups the tokens otherwise, and rounds them otherwise.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tunekit.core.data.codec import IGNORED
from tunekit.core.interfaces import Encoded
from tunekit.core.training.batch import Batch

if TYPE_CHECKING:
    from torch import Size, Tensor, nn

TOKENS = 16
"""Of each row that is asked about: a state that is handed on at all is handed on by a few tokens."""


def leak(
    model: nn.Module,
    rows: Sequence[Encoded],
    batch: Callable[[Sequence[Encoded]], Batch],
    loss: Callable[[Batch], Tensor],
) -> str | None:
    """What changes a row of `rows` that is not its own; None if each is what it is beside any others.

    Args:
        model: in evaluation mode; its parameters get no gradients.
        rows: a few short rows.
        batch: lays rows out for one forward pass.
        loss: of such a batch.
    """
    import torch

    for number in range(len(rows)):
        asked = batch([_labelled(row, at == number) for at, row in enumerate(rows)])
        with torch.enable_grad(), _read(model, asked.inputs["input_ids"].shape) as read:
            gradients = torch.autograd.grad(loss(asked), read, allow_unused=True)
        # Not a number is not zero either.
        moving = [gradient.flatten(0, -2).ne(0).any(-1) for gradient in gradients if gradient is not None]
        if reason := _not_its_own(asked, number, set(torch.stack(moving).any(0).nonzero().flatten().tolist())):
            return reason
    return None


def parted(rows: Sequence[Encoded], shared: int = 0, before: int = 0) -> list[Encoded]:
    """The first tokens of each row after the `shared` ones that all begin with, and so many `before` these."""
    start = max(0, shared - before)
    return [{name: row[name][start : shared + TOKENS] for name in ("input_ids", "labels")} for row in rows]


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
