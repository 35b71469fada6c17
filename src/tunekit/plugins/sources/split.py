"""Split: the rows of a source in training, validation and test shares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import attrs

from tunekit.core.component import Context, check_requirements
from tunekit.core.data.row_source import check_split, strictly
from tunekit.core.data.rows import rank
from tunekit.core.fields import between
from tunekit.core.interfaces import DataSource, Example
from tunekit.errors import ConfigError, DataError, LeftOut


@attrs.frozen(kw_only=True)
class Split(DataSource):
    """A source's rows in up to three splits, by a hash of their content.

    The shares are those of a large number of rows; each row falls where its own hash says, so rows that are added later
    never move the others. Equal rows fall on the same side. Where rows belong to groups (`group` of the source), those
    of a group fall on the same side, and a row that is equal to one on another side is left out and counted.

    Args:
        source: where the rows come from; its split "train" is split.
        train: share of the training rows.
        validation: share of the rows that are held out to be evaluated on.
        test: share of the rows that are not looked at before the end.
        seed: chooses which rows fall where.
    """

    name = "split"

    source: DataSource
    train: float = attrs.field(default=0.8, validator=between(0, 1.0001))
    validation: float = attrs.field(default=0.1, validator=between(0, 1))
    test: float = attrs.field(default=0.1, validator=between(0, 1))
    seed: int = 0

    @property
    def on_error(self) -> Literal["stop", "skip"]:  # type: ignore[override]
        """As the source says."""
        return self.source.on_error

    def check(self, context: Context) -> None:
        """The shares must make up a whole, and the source must work."""
        if abs(self.train + self.validation + self.test - 1) > 1e-6 or not self.train:
            raise ConfigError("the shares must add up to 1, with some for training", "Split.train")
        check_requirements(self.source)
        self.source.check(context)

    def splits(self) -> tuple[str, ...]:
        """Those of which the share is above 0."""
        shares = {"train": self.train, "validation": self.validation, "test": self.test}
        return tuple(name for name, share in shares.items() if share)

    def load(self, split: str) -> Iterable[Example]:
        """Yield the rows of a split, in the order of the source."""
        return strictly(self.examine(split))

    def examine(self, split: str) -> Iterator[tuple[str, Example | DataError]]:
        """The rows of a split with their places in the source; its bad rows come with the split "train"."""
        check_split(self, split)
        sides: dict[float, str] = {}
        empty = True
        for place, row in self.source.examine("train"):
            if isinstance(row, DataError):
                if split == "train":
                    yield place, row
                continue
            side = self._side(row)
            if "group" in row:
                content = rank({key: value for key, value in row.items() if key != "group"}, self.seed)
                first = sides.setdefault(content, side)
                if first != side:
                    if side == split:
                        yield place, LeftOut(f"{place}: equal to a row of another group, in the split {first!r}")
                    continue
            if side == split:
                empty = False
                yield place, row
        if empty:
            yield split, DataError(f"{split}: the source has too few different rows for this share (Split.{split})")

    def _side(self, row: Example) -> str:
        # Held-out shares lie lowest, as those of `Pipeline(validation=...)`: the same seed and share hold out the same.
        number = rank(row, self.seed)
        if number < self.validation:
            return "validation"
        return "test" if number < self.validation + self.test else "train"
