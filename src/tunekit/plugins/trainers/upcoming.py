"""What the next step learns from: read, laid out and sent to the device while this one computes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

import attrs

from tunekit.core.data import batching
from tunekit.core.interfaces import Encoded
from tunekit.core.training.batch import Batch
from tunekit.core.training.parallel import Processes
from tunekit.core.training.rows_loss import RowsLoss
from tunekit.plugins.trainers.micro_batches import Limits, grouped

if TYPE_CHECKING:
    from torch import Tensor, nn


@attrs.frozen(kw_only=True, eq=False)
class StepRows:
    """The rows of one optimizer step.

    Args:
        way: how their loss is computed.
        read: all of them, by their places in the training data.
        tokens: how many of theirs carry loss.
        share: the places of those that this process learns from.
        batches: by the places of their rows, those of the forward passes to be expected.
    """

    way: RowsLoss
    read: Mapping[int, Encoded]
    tokens: int
    share: Sequence[int]
    batches: Mapping[tuple[int, ...], Batch]

    @classmethod
    def of(
        cls, rows: list[int], train: Sequence[Encoded], limits: Limits, processes: Processes, way: RowsLoss
    ) -> StepRows:
        """Those at the places `rows` of `train`, of which `limits` go through the model at once."""
        read = {at: train[at] for at in rows}  # once: rows are in files
        share = processes.share(rows, batching.lengths(list(read.values())))
        batches = {}
        with suppress(Exception):  # it comes again in the forward pass, where what is to be done about it is known
            for group in grouped(share, read, limits, padded=not way.padding_free):
                batches[tuple(group)] = way.batch([read[at] for at in group])
        tokens = sum(map(batching.supervised_tokens, read.values()))
        return cls(way=way, read=read, tokens=tokens, share=share, batches=batches)

    def loss(self, model: nn.Module, places: Sequence[int]) -> Tensor:
        """A part of the step's loss, of the rows at `places`.

        Divided by the tokens of the whole step: every token weighs the same in any split.
        """
        batch = self.batches.get(tuple(places)) or self.way.batch([self.read[at] for at in places])
        return self.way.of(model, batch) / self.tokens


def upcoming(
    make: Callable[[int], StepRows], steps: range, device: str, *, beside: bool
) -> Generator[StepRows, None, None]:
    """What `make` returns for each of `steps`; where `beside`, made by a thread while the step before computes."""
    if not (beside and steps):
        yield from map(make, steps)
        return
    with ThreadPoolExecutor(1, "upcoming", _same_gpu(device)) as thread:
        coming = thread.submit(make, steps[0])
        for following in steps[1:]:
            ready = coming.result()
            coming = thread.submit(make, following)
            yield ready
        yield coming.result()


def _same_gpu(device: str) -> Callable[[], None] | None:
    """What makes the GPU of this thread that of another: each begins with the first."""
    if not device.startswith("cuda"):
        return None
    import torch

    number = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(number)
