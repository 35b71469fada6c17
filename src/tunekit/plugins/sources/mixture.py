"""Mixture: rows of several sources."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Literal

import attrs

from tunekit.core.component import Context, check_requirements
from tunekit.core.data.row_source import check_split, strictly
from tunekit.core.fields import as_tuple
from tunekit.core.interfaces import DataSource, Example
from tunekit.errors import ConfigError, DataError


@attrs.frozen(kw_only=True)
class Mixture(DataSource):
    """Rows of several sources, in proportions: each row is drawn from one of them with the probability of its weight.

    The same fields give the same rows in the same order. A source is read once, row by row; only "repeat" reads one
    again. Without weights the sources come one after the other, each whole (the trainer shuffles).

    Args:
        sources: where the rows come from.
        weights: how often each source is drawn from, relative to the others; None for one after the other.
        caps: the most rows that are taken of each source; None for all.
        exhausted: when a source has no more rows: "go-on" with the others, which uses every row once; "stop", which
            keeps the proportions; or "repeat" it until every source was read to its end.
        seed: of the draws.
    """

    name = "mixture"

    sources: tuple[DataSource, ...] = attrs.field(converter=as_tuple)
    weights: tuple[float, ...] | None = attrs.field(default=None, converter=as_tuple)
    caps: tuple[int, ...] | None = attrs.field(default=None, converter=as_tuple)
    exhausted: Literal["go-on", "stop", "repeat"] = "go-on"
    seed: int = 0

    @property
    def on_error(self) -> Literal["stop", "skip"]:  # type: ignore[override]
        """Bad rows are skipped if every source says so."""
        return "skip" if all(source.on_error == "skip" for source in self.sources) else "stop"

    def check(self, context: Context) -> None:
        """There must be as many weights and caps as sources, all above 0, and each source must work."""
        if not self.sources:
            raise ConfigError("name at least one source", "Mixture.sources")
        for field, values in (("weights", self.weights), ("caps", self.caps)):
            if values is not None and (len(values) != len(self.sources) or not all(value > 0 for value in values)):
                raise ConfigError(f"expected {len(self.sources)} numbers above 0, got {values}", f"Mixture.{field}")
        if self.exhausted != "go-on" and self.weights is None:
            raise ConfigError("has no meaning without weights; give some", "Mixture.exhausted")
        for source in self.sources:
            check_requirements(source)
            source.check(context)

    def splits(self) -> tuple[str, ...]:
        """Those that every source has."""
        return tuple(
            name for name in self.sources[0].splits() if all(name in source.splits() for source in self.sources)
        )

    def load(self, split: str) -> Iterable[Example]:
        """Yield the rows, mixed."""
        return strictly(self.examine(split))

    def examine(self, split: str) -> Iterator[tuple[str, Example | DataError]]:
        """The rows, mixed, with their places in their own sources; a bad row counts towards no cap."""
        check_split(self, split)
        draw = random.Random(self.seed)  # its own: the random state of the run is left alone
        running = [self._rows(number, split) for number in range(len(self.sources))]
        left = set(range(len(running)))  # sources that were not read to their end so far
        alive = list(range(len(running)))
        while alive:
            at = draw.choices(alive, [self.weights[number] for number in alive])[0] if self.weights else alive[0]
            item = next(running[at], None)
            if item is not None:
                yield item
                continue
            left.discard(at)
            if self.exhausted == "stop" or (self.exhausted == "repeat" and not left):
                return
            if self.exhausted == "repeat":
                running[at] = self._sound(at, split)
            else:
                alive.remove(at)

    def _rows(self, number: int, split: str) -> Iterator[tuple[str, Example | DataError]]:
        cap = self.caps[number] if self.caps else None
        taken = 0
        for place, row in self.sources[number].examine(split):
            taken += not isinstance(row, DataError)
            if cap is not None and taken > cap:
                return
            yield place, row
            if cap is not None and taken == cap:
                return

    def _sound(self, number: int, split: str) -> Iterator[tuple[str, Example | DataError]]:
        """The rows a second time: the bad ones were counted the first time."""
        found = False
        for place, row in self._rows(number, split):
            if not isinstance(row, DataError):
                found = True
                yield place, row
        if not found:
            raise DataError(f"sources[{number}] has no row to repeat (Mixture.sources)")
