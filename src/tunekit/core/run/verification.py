"""What `Pipeline.verify` returns, and the few rows and steps that it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, Literal

import attrs

from tunekit.core.common.table import table
from tunekit.core.data.batching import supervised_tokens
from tunekit.core.data.codec import IGNORED, Codec
from tunekit.core.interfaces import DataSource, Encoded, Trainer
from tunekit.errors import DataError, NotSupported

ROWS, LOOKED_AT, TOKENS = 4, 32, 64
"""Rows that are used, those they are chosen from, and to how many tokens each is cut: what keeps it cheap."""
STEPS = 4
"""Optimizer steps that are taken; a checkpoint is written after the second."""

Measured = tuple[float, float]
"""An error, and the bound that it is to keep to."""


@attrs.frozen(kw_only=True)
class VerifiedLine:
    """One comparison of two ways to the same numbers.

    Args:
        check: what was compared.
        status: "pass", "fail", or "n/a" where there is nothing to compare.
        difference: the error against float64 that comes closest to its bound, relative to the size of the numbers; of
            tensors that may not move, how many did.
        bound: up to where it is as accurate as the plain way.
        reason: why it could not be measured; empty where it was.
    """

    check: str
    status: Literal["pass", "fail", "n/a"]
    difference: float | None = None
    bound: float | None = None
    reason: str = ""


@attrs.frozen(kw_only=True)
class Verification:
    """What `Pipeline.verify` returns; prints as a table.

    Args:
        lines: one for each comparison.
    """

    lines: tuple[VerifiedLine, ...]

    @property
    def ok(self) -> bool:
        """Whether no line failed."""
        return all(line.status != "fail" for line in self.lines)

    def __str__(self) -> str:
        shown = [
            [line.check, line.status, *("-" if x is None else f"{x:.2g}" for x in (line.difference, line.bound))]
            for line in self.lines
        ]
        reasons = [" ".join(line.reason.split()) for line in self.lines]
        rows = [[*cells, reason] for cells, reason in zip(shown, reasons, strict=True)]
        return table(["check", "status", "difference", "bound", "reason"], rows)


def some_rows(source: DataSource, trainer: Trainer, codec: Codec, room: int | None) -> list[Encoded]:
    """A few of the first rows, short and long ones, cut to what is cheap; DataError if none can be used.

    Args:
        source: the training rows; those it cannot read are passed over.
        trainer: says how a row is encoded.
        codec: tokenizer and template.
        room: tokens that the model and the method leave for a row; None where it is unknown.
    """
    found: list[Encoded] = []
    for _, example in islice(source.examine("train"), LOOKED_AT):
        with suppress(DataError):  # a run would tell of it
            if not isinstance(example, DataError):
                found.append(trainer.encode(example, codec))
    found = sorted(filter(supervised_tokens, found), key=lambda row: len(row["labels"]))
    if not found:
        raise DataError(f"none of the first {LOOKED_AT} rows can be learned from")
    chosen = [found[at * (len(found) - 1) // (ROWS - 1)] for at in range(ROWS)]
    limit = min(TOKENS, room or TOKENS)
    # Long rows to different lengths: without padding between them there would be nothing to compare.
    return [_cut(row, max(2, limit - at * limit // 8)) for at, row in zip(reversed(range(ROWS)), chosen, strict=True)]


def _cut(row: Encoded, limit: int) -> Encoded:
    """At most `limit` tokens of a row, the first that is learned among them."""
    first = next(at for at, label in enumerate(row["labels"]) if at and label != IGNORED)
    start = max(0, min(first - limit // 2, len(row["labels"]) - limit))
    return {name: list(values[start : start + limit]) for name, values in row.items()}


def line(check: str, measure: Callable[[], Measured]) -> VerifiedLine:
    """The line of what `measure` returns: an error, and the bound that it is to keep to."""
    try:
        difference, bound = measure()
    except NotSupported as error:
        return VerifiedLine(check=check, status="n/a", reason=str(error))
    except Exception as error:  # whatever a component does wrong is what this line tells
        return VerifiedLine(check=check, status="fail", reason=f"{type(error).__name__}: {error}")
    return VerifiedLine(
        check=check, status="pass" if difference <= bound else "fail", difference=difference, bound=bound
    )


def shortened(trainer: Trainer) -> Trainer:
    """The trainer with a few steps to take, as far as its fields say how many."""
    wanted: dict[str, Any] = {
        "max_steps": STEPS,
        "batch_size": ROWS // 2,
        "warmup": 0.0,
        "save_every": STEPS // 2,
        "save_minutes": None,
        "evaluate_every": None,
        "keep_best": None,
    }
    return attrs.evolve(trainer, **known(trainer, wanted))


def known(trainer: Trainer, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What of `wanted` are fields of the trainer."""
    names = {field.name for field in attrs.fields(type(trainer))}
    return {name: value for name, value in wanted.items() if name in names}
