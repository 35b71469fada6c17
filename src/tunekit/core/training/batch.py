"""Rows of one forward pass as tensors on the device, and where in what the model makes of them each token is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.data.batching import collate, lengths, on_device
from tunekit.core.data.codec import IGNORED
from tunekit.core.interfaces import Encoded
from tunekit.core.training.few_shapes import multiple_of
from tunekit.core.training.prefixes import Layout
from tunekit.core.training.segments import flatten

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Place = Callable[[int, int], int]
"""Of the number of a row and of a token in it: where that is."""


@attrs.frozen(kw_only=True, eq=False)
class Batch:
    """Rows of one forward pass.

    Args:
        rows: as they are encoded.
        inputs: what the model takes.
        place: where in its flattened output each token is.
        places: shape (supervised tokens,): where that is which predicts each of these.
        wanted: shape (supervised tokens,): these tokens.
        padded: whether some of its rows are filled up to the length of others.
    """

    rows: Sequence[Encoded]
    inputs: Mapping[str, Any]
    place: Place
    places: Tensor
    wanted: Tensor
    padded: bool

    def places_of_tokens(self) -> list[int]:
        """Where each token of each row is, row by row."""
        return [self.place(number, at) for number, row in enumerate(self.rows) for at in range(len(row["input_ids"]))]


def end_to_end(rows: Sequence[Encoded], device: str, shared: bool, dtype: torch.dtype) -> Batch:
    """`rows` without padding; where `shared` and it pays, what they begin with alike is there once.

    Where a model of this `dtype` is to see few lengths, there are tokens behind them that nothing sees or learns from.
    """
    layout = Layout.of(rows, shared).filled(multiple_of(dtype, device))
    return _with_targets(rows, flatten(layout, device), layout.place, device, False)


def padded(rows: Sequence[Encoded], pad_id: int, device: str) -> Batch:
    """`rows`, each as long as the longest."""
    inputs: dict[str, Any] = collate(rows, pad_id, device)
    width = inputs.pop("labels").shape[1]
    shorter = any(length < width for length in lengths(rows))
    return _with_targets(rows, inputs, lambda row, at: row * width + at, device, shorter)


def _with_targets(rows: Sequence[Encoded], inputs: Mapping[str, Any], place: Place, device: str, padded: bool) -> Batch:
    """A place in a shared prefix is there for each of its rows: the loss and gradient of each are added up."""
    import torch

    pairs: list[tuple[int, Any]] = [
        (place(number, at), label)
        for number, row in enumerate(rows)
        for at, label in enumerate(row["labels"][1:])
        if label != IGNORED
    ]
    places = on_device([at for at, _ in pairs], device, torch.long)
    wanted = on_device([label for _, label in pairs], device, torch.long)
    return Batch(rows=rows, inputs=inputs, place=place, places=places, wanted=wanted, padded=padded)
