"""Logits of some tokens alone: of the others, nothing as large as the vocabulary is ever made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunekit.core.data.batching import on_device
from tunekit.core.model.hooks import standing_in

if TYPE_CHECKING:
    from torch import Tensor, nn


def logits_at(model: nn.Module, batch: Mapping[str, Tensor], places: Sequence[int]) -> Tensor:
    """The logits of `model` at some tokens of `batch`, shape (places, vocabulary), in its dtype.

    The output layer is given these tokens as if they were one row. What the model does to logits afterwards, such as
    scaling or capping them, it does to these. One that does more, or gets its logits elsewhere, makes them of all.

    Args:
        model: see above.
        batch: `input_ids` of shape (rows, tokens), and what goes with them.
        places: numbers of the tokens, counted over the rows.
    """
    shape = batch["input_ids"].shape
    at = on_device(places, str(batch["input_ids"].device))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    given: list[bool] = []

    def of_some(hidden: Tensor, *more: Any, **options: Any) -> Any:
        given.append(hidden.shape[:-1] == shape)
        return real(hidden.flatten(0, 1)[at][None] if given[-1] else hidden, *more, **options)

    if head is not None and places:
        try:
            with standing_in(head, of_some) as real:
                logits: Tensor = model(**batch, use_cache=False).logits
        except Exception:  # whatever code of somebody else's makes of another shape
            if not any(given):
                raise
        else:
            if given == [True] and logits.shape[:-1] == (1, len(places)):
                return logits[0]
            if not any(given):
                return logits.flatten(0, 1)[at]
    whole: Tensor = model(**batch, use_cache=False).logits
    return whole.flatten(0, 1)[at]
