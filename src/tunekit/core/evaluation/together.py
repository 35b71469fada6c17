"""Which rows may go through a model together: those that are then what each of them is alone.

A model that reads its padding, counts positions in the batch, or scales them by the longest row of it (LongRoPE,
dynamic NTK), gives a row other logits beside a longer one. No list says which models these are. The model itself is
asked, once, with a short row beside a long one and alone: in float64, where nothing is left of rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext, suppress
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from tunekit.core.data.batching import chunks, collate
from tunekit.core.evaluation.logits import logits_at
from tunekit.core.training.excerpts import TOKENS, excerpts

if TYPE_CHECKING:
    from torch import Tensor, nn

How = Literal["padded", "alike", "alone"]
"""Rows of any length, padded to the longest; rows of one length; each by itself."""
Tokens = Sequence[int]
Compute = Callable[[Sequence[Tokens]], "Tensor"]
"""What the model makes of the first of some rows, shape (what, features)."""

SHORT, LONG = 8, 24
"""Tokens of the two rows that a model is asked with, unless its configuration names a length that matters beyond."""
STEPS = 2
"""Tokens that are generated: the first comes of the prompt, the second of the cache."""
EXACT = 1e-7
"""Relative difference in float64 that is rounding alone; what is not is above 1e-3."""
ROUNDED = {"float32": 1e-4}
"""The same for a model that does not compute in float64, in its own dtype; of half precision, 0.05."""

_known: dict[tuple[Any, ...], How] = {}
"""What was found of models, by all that it depends on."""


def groups(how: How, lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of rows of these `lengths` that go through a model together, of at most `tokens` padded tokens."""
    if how == "padded":
        yield from chunks(lengths, tokens)
    elif how == "alone":
        yield from chunks(lengths, tokens, most=1)
    else:
        longest_first = sorted(range(len(lengths)), key=lambda at: lengths[at], reverse=True)
        for _, alike in groupby(longest_first, key=lambda at: lengths[at]):
            places = list(alike)
            yield from ([places[at] for at in group] for group in chunks([lengths[at] for at in places], tokens))


def read(model: nn.Module, fill: int, rows: Sequence[Tokens]) -> How:
    """How `model` may read `rows`, padded on the right with the token `fill`, as they are evaluated."""

    def states(given: Sequence[Tokens]) -> Tensor:
        batch = collate([{"input_ids": row, "labels": row} for row in given], fill, _device(model))
        batch.pop("labels")
        end = len(given[0])  # what changes a token at all, changes the last ones
        return logits_at(model, batch, range(max(0, end - TOKENS), end))

    return _found(model, "read", states, rows, 0)


def answered(
    model: nn.Module, prompts: Sequence[Tokens], new: int, stops: Collection[int], answer: Callable[..., Any]
) -> How:
    """How `model` may answer `prompts`, padded on the left, in up to `new` tokens.

    Args:
        model: the model.
        prompts: as tokens.
        new: tokens of the longest answer.
        stops: tokens that end an answer.
        answer: answers prompts, given them, how many tokens to make, and what changes the logits of each.
    """
    follows = next(token for token in range(len(stops) + 1) if token not in stops)

    def logits(given: Sequence[Tokens]) -> Tensor:
        import torch

        heard = _Forced(follows)
        answer(given, STEPS, heard)
        return torch.stack(heard.logits)

    return _found(model, "answered", logits, prompts, max(0, new - STEPS))


class _Forced:
    """Keeps the logits of the first row at each step, and has the same token follow whatever they are."""

    def __init__(self, follows: int) -> None:
        self.logits: list[Tensor] = []
        self._follows = follows

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        import torch

        self.logits.append(logits[0])
        forced = torch.full_like(logits, -torch.inf)
        forced[:, self._follows] = 0.0
        return forced


def _found(model: nn.Module, what: str, compute: Compute, rows: Sequence[Tokens], more: int) -> How:
    """What is known of such a model, or is found now."""
    if len(rows) < 2:
        return "alone"
    short, long = _asked_with(model, rows, more)
    kinds = frozenset(f"{type(module).__module__}.{type(module).__qualname__}" for module in model.modules())
    sizes = (len(short), len(long)) if len(long) > LONG else ()
    key = (what, kinds, model.config.to_json_string(), _device(model), sizes)
    if key not in _known:
        _known[key] = _ask(model, compute, short, long)
        if (how := _known[key]) != "padded":
            together = "rows of one length together" if how == "alike" else "one row at a time"
            name = getattr(model.config, "model_type", type(model).__name__)
            warnings.warn(
                f"{name}: a row beside a longer one is not {what} as it is alone; evaluated are {together}",
                stacklevel=4,
            )
    return _known[key]


def _asked_with(model: nn.Module, rows: Sequence[Tokens], more: int) -> tuple[Tokens, Tokens]:
    """A short row and a long one; the shortest and the longest where the model computes otherwise from a length on."""
    by_length = sorted(map(list, rows), key=len)
    short, long = by_length[0], by_length[-1]
    grown = [*long, *(long[at % len(long)] for at in range(more))]
    whole = [{"input_ids": row, "labels": row} for row in (short, grown)]
    if len(grown) > TOKENS and excerpts(whole, model.config) is whole:
        return short, grown
    short, long = short[:SHORT], long[:LONG]
    return (short if len(short) < len(long) else short[: max(1, len(short) // 2)]), long


def _ask(model: nn.Module, compute: Compute, short: Tokens, long: Tokens) -> How:
    import torch

    from tunekit.core.training.float64 import in_float64

    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    in_full = (in_float64(model), EXACT), (nullcontext(), ROUNDED.get(dtype, 5e-2))
    for precision, tolerance in in_full:
        with torch.no_grad(), suppress(Exception), precision:  # an operation that knows no float64
            return _first(compute, compute([short]), short, long, tolerance)
    return "alone"


def _first(compute: Compute, alone: Tensor, short: Tokens, long: Tokens, tolerance: float) -> How:
    """The first way that gives what there is `alone`, relative to its size at each token."""
    ways: tuple[tuple[How, Tokens], ...] = (("padded", long), ("alike", long[: len(short)]))
    for how, beside in ways:
        try:
            away = (compute([short, beside]) - alone).norm(dim=-1) / alone.norm(dim=-1)
        except Exception:  # somebody else's model, that takes no padding
            continue
        if bool((away <= tolerance).all()):
            return how
    return "alone"


def _device(model: nn.Module) -> str:
    return str(next(model.parameters()).device)
