"""Which rows go through the model at once, and fewer of them where the memory does not suffice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from tunekit.core.common.random_states import random_states, set_random_states
from tunekit.core.data import batching
from tunekit.core.interfaces import Encoded
from tunekit.core.training.parallel import Processes, started
from tunekit.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor

    from tunekit.plugins.trainers.sft import SFT

AUTO_TOKENS = 4096
"""In one forward pass, counted as they are padded, where the user does not say how many rows or tokens."""
LOOKED_AT = 1_000_000
"""So many rows of a run are looked at, to find those that go through the model at once and are most."""
ALLOCATOR = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch's allocators say in a plain RuntimeError."""
LABELS_READ = 20_000
"""So many rows are read for their labels, the first: their lengths are known without."""


@attrs.define(kw_only=True)
class Limits:
    """How much goes through the model at once: a part of checkpoints, since it settles the last bits of a result.

    Args:
        tokens: in one forward pass, counted as they are padded; one row may be longer.
        rows: in one forward pass; None for no limit but the tokens.
        halved: how often there was too little memory.
    """

    tokens: int = 2**62
    rows: int | None = None
    halved: int = 0

    @classmethod
    def of(cls, sft: SFT) -> Limits:
        """Those that the trainer's fields ask for."""
        size = sft.micro_batch_size
        return cls(tokens=sft.packing or AUTO_TOKENS) if size == "auto" else cls(rows=int(size))

    def resumed(self, asked: Limits) -> Limits:
        """Those of a checkpoint, unless a resume was forced that asks for others: what was settled stays settled."""
        alike = (self.rows is None) == (asked.rows is None) and self.tokens <= asked.tokens
        return self if self.halved or (alike and self.rows == asked.rows) else asked

    def halve(self, rows: int, tokens: int) -> None:
        """Allow half of a forward pass that did not fit, of so many rows and padded tokens."""
        self.halved += 1
        if self.rows is None:
            self.tokens = tokens // 2
        else:
            self.rows = rows // 2


@attrs.define(kw_only=True)
class Share:
    """What came of the rows that one process has of a step.

    Args:
        rows: of each forward pass, by their places.
        losses: of each forward pass, a part of the step's loss, still where it was made; empty where others are told.
        limits: as they are now.
        notes: what was changed in order to get here, in words.
    """

    rows: list[list[int]]
    losses: list[Tensor]
    limits: Limits
    notes: list[str]


def learn(
    step: int,
    rows: Sequence[int],
    train: Mapping[int, Encoded],
    limits: Limits,
    *,
    padded: bool,
    loss: Callable[[Sequence[int]], Tensor],
    backward: Callable[[Tensor], None],
    clear: Callable[[], bool | None],
    most: Callable[[int], int] | None = None,
) -> Share:
    """Make the gradient of `rows`, in as many forward passes as the limits ask for, or the memory.

    Where the memory does not suffice, all begins again with half as much in a forward pass: without gradients, and
    with the random states of the first attempt. What is computed is the same; dropout is that of the smaller passes.

    Args:
        step: its number.
        rows: the rows to learn from, by their places in the training data.
        train: rows by place, at least these.
        limits: what may go through the model at once; made smaller as need be.
        padded: whether rows are padded.
        loss: of the rows at some places, as a part of the step's.
        backward: adds the gradient of a loss.
        clear: takes all gradients away; true if it gave back memory besides, so that as much may fit after all.
        most: for a model in pieces, the most forward passes that any process makes, from this one's number of them.
            All make as many: the last of one with fewer are of the step's shortest row, with no weight.

    Raises:
        TrainingError: a row does not fit alone; or any do not, and the model is in pieces: others are in the same pass.
    """
    random = random_states()
    notes: list[str] = []
    while True:
        losses: list[Tensor] = []
        group: list[int] = []
        try:
            groups = grouped(rows, train, limits, padded)
            idle = most(len(groups)) - len(groups) if most else 0
            for group in groups:
                part = loss(group)
                backward(part)
                losses.append(part.detach())
            for _ in range(idle):
                group = [min(train, key=lambda at: len(train[at]["input_ids"]))]
                backward(0 * loss(group))
            return Share(rows=groups, losses=losses, limits=limits, notes=notes)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = f"{type(error).__name__}: {error}".splitlines()[0]
        # Outside of the handler: while the error lives, so does what the forward pass had made.
        gave_back = clear()
        _free()
        set_random_states(random)
        lengths = batching.lengths([train[at] for at in group])
        size = len(group) * max(lengths) if padded else sum(lengths)
        if most:
            raise TrainingError(
                f"step {step}: out of memory with {len(group)} rows, {size} tokens, in a forward pass ({said}); a "
                "model in pieces cannot begin a step again: set a smaller micro_batch_size, or gradient_checkpointing"
            )
        if gave_back:
            notes.append(f"step {step}: out of memory; dequantized weights are not kept from here on ({said})")
            continue
        if len(group) == 1:
            raise TrainingError(
                f"step {step}: out of memory on encoded training row {group[0] + 1} alone, which has {size} tokens "
                f"({said}); set max_length below that, or take a smaller or quantized base"
            )
        limits.halve(len(group), size)
        at_most = f"{limits.tokens} tokens" if limits.rows is None else f"{limits.rows} rows"
        notes.append(
            f"step {step}: out of memory with {len(group)} rows, {size} tokens, in a forward pass; from here on at "
            f"most {at_most}, the step's rows and loss as they were ({said})"
        )


def grouped(rows: Sequence[int], train: Mapping[int, Encoded], limits: Limits, padded: bool) -> list[list[int]]:
    """The rows by forward pass, rows of like length together."""
    lengths = batching.lengths([train[at] for at in rows])
    return [[rows[at] for at in group] for group in batching.chunks(lengths, limits.tokens, limits.rows, padded)]


def exchanged(processes: Processes, attempt: Callable[[], Share], device: str, *, alone: bool) -> list[Share]:
    """The shares of all processes, in the order of their ranks; on a GPU, nobody waits for their losses.

    Args:
        processes: those of the run.
        attempt: makes the share of this one.
        device: of this one.
        alone: what it raises is raised here alone: in pieces, the others are amidst a pass, and end with this process.
    """
    own: list[Share] = []

    def told() -> Share:
        own.append(attempt())
        return attrs.evolve(own[0], losses=[])

    shares = processes.gather(told()) if alone else processes.together(told)
    losses = iter(processes.gather_numbers(own[0].losses, [len(share.rows) for share in shares], device))
    return [attrs.evolve(share, losses=[next(losses) for _ in share.rows]) for share in shares]


def read(shares: Sequence[Share], norm: Tensor) -> tuple[list[tuple[float, list[int]]], float]:
    """The losses of a step with the rows that they are of, and the norm of its gradient, as numbers.

    The one time in a step that a GPU is waited for.
    """
    import torch

    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    there = [loss for share in shares for loss in share.losses]
    *found, length = torch.stack([tensor.detach().double() for tensor in (*there, whole)]).tolist()
    return list(zip(found, [rows for share in shares for rows in share.rows], strict=True)), length


def heaviest(
    train: Sequence[Encoded], sft: SFT, seed: int, *, padded: bool
) -> tuple[list[int], list[int], tuple[int, int]]:
    """The rows of the forward passes of a run with the most tokens: among the first of a step, and the later ones.

    Then the most supervised tokens that any pass of either kind has, which need not be those.

    Args:
        train: encoded rows.
        sft: the trainer of the run.
        seed: of the run.
        padded: whether rows are padded.
    """
    lengths, limits, processes = batching.lengths(train), Limits.of(sft), started()
    most = [(0, 0), (0, 0)]
    found: tuple[list[int], list[int]] = ([], [])
    supervised = [batching.supervised_tokens(row) for _, row in zip(range(LABELS_READ), train, strict=False)]
    labels = [0, 0]
    per_epoch = batching.steps_per_epoch(len(lengths), sft.batch_size)
    epochs = math.ceil(sft.planned_steps(len(lengths)) / per_epoch)
    order = batching.RowOrder(lengths=lengths, batch_size=sft.batch_size, seed=seed, order=sft.order)
    for epoch in range(min(epochs, math.ceil(LOOKED_AT / len(lengths)))):
        for start in range(0, len(lengths), sft.batch_size):
            rows = order.epoch(epoch)[start : start + sft.batch_size]
            for rank in range(processes.count):
                share = attrs.evolve(processes, rank=rank).share(rows, [lengths[at] for at in rows])
                groups = batching.chunks([lengths[at] for at in share], limits.tokens, limits.rows, padded)
                for number, group in enumerate(groups):
                    each = [lengths[share[at]] for at in group]
                    size = len(group) * max(each) if padded else sum(each), max(each)
                    later = number > 0
                    known = [supervised[share[at]] for at in group if share[at] < len(supervised)]
                    labels[later] = max(labels[later], sum(known))
                    if size > most[later]:
                        most[later], found[later][:] = size, [share[at] for at in group]
        if sft.order == "as-given":
            break
    return *found, (labels[0], labels[1])


def smallest(limits: Sequence[Limits]) -> Limits:
    """Limits that suit every process."""
    rows = [each.rows for each in limits if each.rows is not None]
    return Limits(
        tokens=min(each.tokens for each in limits),
        rows=min(rows) if rows else None,
        halved=max(each.halved for each in limits),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or not."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATOR)


def _free() -> None:
    """Give back what the allocator keeps of the attempt: in pieces of other sizes, it is of no use to the next."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
