"""The report of a validation: what is wrong with the data, what is in it, what training on it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from html import escape
from pathlib import Path
from textwrap import fill
from typing import Any

import attrs

from tunekit.core.common.table import html_table, table
from tunekit.core.inspection.corrected import Corrected
from tunekit.core.inspection.data_figures import Distribution, Figures, compact
from tunekit.core.inspection.findings import WIDTH, Finding, Group, grouped, listing, many


@attrs.frozen(kw_only=True, slots=False)
class Report:
    """What `tunekit.validate` returns; prints in 100 columns.

    Args:
        problems: every problem, in the order in which it was found; prints as `file:line: reason (field)`.
        splits: figures of the rows read, by split: "train", and "validation" where that has a source or split.
        unit: of lengths: "tokens", or "characters" where no model was given.
        limit: tokens that a row may have, by the trainer or the model; None without a model.
        context_length: tokens of the model's context that rows may take; None where that is not known.
        over_length: rows that are longer than `limit`.
        sufficient_length: the smallest `max_length` that no row exceeds, 0 without a model.
        training_rows: rows that one pass of a run takes, without what is held out or dropped.
        validation_rows: rows held out.
        leaked: held-out rows that, or whose prompts, are trained on as well.
        tokens: of one pass over the training rows, as they are cut; None without a model.
        supervised_tokens: those of them that carry loss.
        epochs: passes that time and cost are reckoned for.
        advised_epochs: what the OpenAI cookbook chooses for that many rows.
        seconds: what training takes at the given rate; None where none was given.
        cost: what it costs at the given price; None where none was given.
        advice: what to consider, a sentence each.
    """

    problems: tuple[Finding, ...] = attrs.field(repr=False)
    splits: Mapping[str, Figures]
    unit: str
    limit: int | None
    context_length: int | None
    over_length: int
    sufficient_length: int
    training_rows: int
    validation_rows: int
    leaked: int
    tokens: int | None
    supervised_tokens: int | None
    epochs: float
    advised_epochs: int
    seconds: float | None
    cost: float | None
    advice: tuple[str, ...]
    _write: Callable[[Path], Corrected] = attrs.field(repr=False, eq=False)

    @property
    def ok(self) -> bool:
        """Whether a run would take this data."""
        return not self.errors

    @cached_property
    def errors(self) -> tuple[Finding, ...]:
        """The problems that stop a run."""
        return tuple(finding for finding in self.problems if finding.severity == "error")

    @cached_property
    def warnings(self) -> tuple[Finding, ...]:
        """The problems with which a run goes on."""
        return tuple(finding for finding in self.problems if finding.severity == "warning")

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The problems by reason: errors first, the most frequent first."""
        return grouped(self.problems)

    def write_corrected(self, path: str | Path) -> Corrected:
        """Write the training data without the rows that a run cannot take, as JSON Lines of examples.

        The source is read again, and must be as it was. What a share would hold out is in the file, too.

        Args:
            path: a new file.

        Raises:
            ConfigError: the file exists, or its directory does not; nothing is overwritten.
            DataError: the data has changed, is no JSON, or its rows are of several forms; nothing is written.
        """
        return self._write(Path(path))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values that JSON can hold."""
        fields = attrs.asdict(self, filter=lambda field, _: field.name not in ("_write", "problems"))
        fields["advice"] = list(self.advice)
        groups = [{**attrs.asdict(group), "places": list(group.places)} for group in self.groups]
        return {"ok": self.ok, "groups": groups, "problems": [attrs.asdict(found) for found in self.problems], **fields}

    def __str__(self) -> str:
        tables = [table(["data", *self.splits], self._data()), table(["training", ""], self._training())]
        return "\n\n".join(filter(None, [self._verdict(), *tables, *self._listings()]))

    def _repr_html_(self) -> str:
        tables = html_table(["data", *self.splits], self._data()) + html_table(["training", ""], self._training())
        listings = "\n\n".join(filter(None, self._listings()))
        return f"<p><b>{escape(self._verdict())}</b></p>{tables}" + (
            f"<pre>{escape(listings)}</pre>" if listings else ""
        )

    def _verdict(self) -> str:
        verdict = "ok" if self.ok else "not ok"
        return f"validation: {verdict}, {many(len(self.errors), 'error')}, {many(len(self.warnings), 'warning')}"

    def _listings(self) -> list[str]:
        """Errors, warnings and advice; an empty text for each that is not there."""
        errors = [group for group in self.groups if group.severity == "error"]
        warnings = [group for group in self.groups if group.severity == "warning"]
        return [
            listing("errors, at which a run stops", errors),
            listing("warnings, with which a run goes on", warnings),
            "\n".join(fill(text, WIDTH, initial_indent="- ", subsequent_indent="  ") for text in self.advice),
        ]

    def _data(self) -> list[list[str]]:
        """A line for each figure, a column for each split; a figure that no split has is left out."""
        lines: list[tuple[str, Callable[[Figures], str]]] = [
            ("rows", lambda split: f"{split.rows:,}"),
            ("sound rows", lambda split: f"{split.sound:,}" if split.sound != split.rows else ""),
            ("left out by the source", lambda split: f"{sum(split.left_out.values()):,}" if split.left_out else ""),
            ("schemas", lambda split: compact(split.schemas)),
            ("roles", lambda split: compact(split.roles)),
            ("turns", lambda split: _spread(split.turns)),
            (f"length in {self.unit}", lambda split: _spread(split.lengths)),
            ("supervised tokens", lambda split: _spread(split.supervised)),
            ("no system message", lambda split: many(split.without_system, "row") if split.without_system else ""),
            ("duplicates", lambda split: _duplicates(split)),
            ("repeated prompts", lambda split: f"{split.repeated_prompts:,}" if split.repeated_prompts else ""),
            ("answers", lambda split: _labels(split)),
        ]
        cells = [[name, *(show(figures) for figures in self.splits.values())] for name, show in lines]
        return [line for line in cells if any(line[1:])]

    def _training(self) -> list[list[str]]:
        lines = [["training rows", f"{self.training_rows:,}"], ["validation rows", f"{self.validation_rows:,}"]]
        if self.leaked:
            lines.append(["leaked validation rows", f"{self.leaked:,}"])
        if self.tokens is not None and self.supervised_tokens is not None:
            share = f" ({self.supervised_tokens / self.tokens:.1%})" if self.tokens else ""
            lines.append(["tokens in one pass", f"{self.tokens:,}"])
            lines.append(["supervised tokens", f"{self.supervised_tokens:,}{share}"])
        if self.limit is not None:
            lines.append(["over-length rows", f"{self.over_length:,}, at most {self.limit:,} tokens are taken"])
        if self.over_length:
            lines.append(["sufficient max_length", f"{self.sufficient_length:,}"])
        lines.append(["epochs", f"{self.epochs:g}, advised {self.advised_epochs}"])
        if self.seconds is not None:
            lines.append(["time at the given rate", _clock(self.seconds)])
        if self.cost is not None:
            lines.append(["cost at the given price", f"{self.cost:,.2f}" if self.cost >= 1 else f"{self.cost:.2g}"])
        return lines


def _spread(numbers: Distribution | None) -> str:
    if numbers is None:
        return ""
    return f"p50 {numbers.p50:,.0f}, p95 {numbers.p95:,.0f}, max {numbers.maximum:,.0f}"


def _duplicates(split: Figures) -> str:
    if not split.duplicates and not split.near_duplicates:
        return ""
    return f"{split.duplicates:,} exact, {split.near_duplicates:,} near"


def _labels(split: Figures) -> str:
    if not split.labels:
        return ""
    label, count = next(iter(split.labels.items()))
    text = repr(label) if len(label) <= 30 else f"{label[:27]!r}..."
    return f"{len(split.labels)} different, {text} in {count / split.sound:.1%}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{rest:02}"
