"""What a run keeps of its rows and its plan, so that its report needs neither the data nor the model again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.data.codec import Codec
from tunekit.core.inspection.preview import Preview, PreviewedRow, Stretch, of_encoded
from tunekit.core.run.files import write_json

if TYPE_CHECKING:
    from tunekit.core.data.dataset import Data

OVERVIEW = "overview.json"
ROWS = 2
"""So many rows are shown, the first."""
TOKENS = 400
"""So many tokens are shown of each."""
BINS = 20


def write(directory: Path, data: Data, codec: Codec, planned: Mapping[str, Any]) -> None:
    """Write `overview.json`.

    Args:
        directory: the run directory.
        data: the rows of the run.
        codec: by which they were encoded.
        planned: optimizer `steps`, the highest `learning_rate`, and `memory`: bytes by part of a training step when
            they are most; None for what the trainer does not say.
    """
    # One at a time: beside no other there is no padding.
    shown = [of_encoded([row], codec, tokens=TOKENS)[0] for row in data.train[:ROWS]]
    found = {"planned": planned, "lengths": histogram(data.train.lengths), "preview": list(map(attrs.asdict, shown))}
    write_json(directory / OVERVIEW, found)


def preview(overview: Mapping[str, Any]) -> Preview:
    """The rows that an `overview.json` holds."""
    rows = overview["preview"]
    return Preview([PreviewedRow(**{**row, "stretches": [Stretch(**one) for one in row["stretches"]]}) for row in rows])


def histogram(lengths: Sequence[int]) -> dict[str, list[int]]:
    """How many rows are how long: `counts[n]` of `edges[n]` tokens up to, and without, `edges[n + 1]`.

    Edges are whole numbers, equally far apart, and every length is within them.
    """
    low, high = min(lengths), max(lengths)
    width = (high - low) // BINS + 1
    edges = list(range(low, high + width + 1, width))
    counts = [0] * (len(edges) - 1)
    for length in lengths:
        counts[(length - low) // width] += 1
    return {"edges": edges, "counts": counts}
