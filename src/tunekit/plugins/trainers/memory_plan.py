"""What SFT does to keep within the memory there is: nothing while it suffices, else as little as suffices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.component import Context
from tunekit.core.data import batching
from tunekit.core.interfaces import Encoded, Quantizer
from tunekit.core.lean.forwards import may_keep
from tunekit.core.memory.budget import STANDING, DoesNotFitError, available, fits, gibibytes, in_words, with_room
from tunekit.core.memory.estimate import is_roomy
from tunekit.core.memory.memory_plan import MemoryPlan
from tunekit.errors import NotSupported
from tunekit.plugins.trainers.micro_batches import Limits
from tunekit.plugins.trainers.recomputing import layers_to_recompute
from tunekit.plugins.trainers.rehearsal import Rehearsal

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from tunekit.plugins.trainers.sft import SFT


def plan(
    sft: SFT,
    model: Callable[[], nn.Module],
    train: Sequence[Encoded],
    tokenizer: PreTrainedTokenizerBase,
    quantizer: Quantizer | None,
    context: Context,
    unless_roomy: PretrainedConfig | None,
) -> MemoryPlan | None:
    """See `Trainer.plan_memory`."""
    budget = available(context.device) if sft.memory is None else int(sft.memory * 2**30)
    longest = max(batching.lengths(train))
    if unless_roomy is not None and sft.memory is None:
        tokens = min(Limits.of(sft).tokens, sft.batch_size * longest)
        if is_roomy(unless_roomy, tokens, longest, sft.batch_size, budget):
            return None
    rehearsal = Rehearsal.of(sft, model(), train, tokenizer, quantizer, context)
    found = settled(sft, rehearsal.parts, len(layers_to_recompute(rehearsal.model)), budget, longest)
    if sft.kept_bytes is None:
        found = _keeping(found, rehearsal)
    way = rehearsal.way
    rows = "without padding" if way.padding_free else "padded"
    if sft.padding_free and not way.padding_free:
        rows += f": {next(note for note in way.notes if note.startswith('no padding_free')).partition(': ')[2]}"
    return attrs.evolve(found, choices={"rows": rows, **found.choices})


def settled(sft: SFT, needs: Callable[[SFT], Mapping[str, int]], layers: int, budget: int, longest: int) -> MemoryPlan:
    """The plan by which a step fits into `budget` bytes, the quickest first.

    Everything kept and as many tokens in a forward pass as the trainer asks for; the activations of the first layers
    computed again, as few as suffice; of all layers; fewer tokens at once. What the user has set is left alone.

    Args:
        sft: the trainer as the user set it.
        needs: bytes by part of a step of a trainer; NotSupported where it cannot train so.
        layers: that can be recomputed one by one.
        budget: bytes there are.
        longest: tokens of the longest row, which cannot be divided.

    Raises:
        DoesNotFitError: the memory that the user allows does not suffice; where he names none, the least is tried.
    """
    least = asked = _with(sft, gradient_checkpointing=False) if sft.gradient_checkpointing == "auto" else sft
    parts = whole = needs(asked)
    if not fits(parts, budget) and sft.gradient_checkpointing == "auto":
        with suppress(NotSupported):  # then there are fewer tokens to try
            every = _with(sft, gradient_checkpointing=True)
            least, parts = every, needs(every)
        if fits(parts, budget):
            least, parts = _fewest(least, needs, layers, budget, whole, parts)
    while not fits(parts, budget) and _is_open(sft) and Limits.of(least).tokens > longest:
        least = _with(least, packing=max(longest, _fewer(Limits.of(least).tokens, parts, budget)))
        parts = needs(least)
    if not fits(parts, budget) and sft.memory is not None:
        raise DoesNotFitError(
            f"{gibibytes(budget)} do not suffice: a step needs {gibibytes(sum(parts.values()))} at least, of it "
            f"{in_words(parts)}; take a smaller or quantized base, dtype='bfloat16', or a lower max_length",
            "SFT.memory",
        )
    choices = _choices(sft, least, layers)
    if least != asked:
        choices["why"] = f"{gibibytes(sum(whole.values()))} would be needed without, of {gibibytes(budget)}"
    if not fits(parts, budget):
        choices["not enough"] = f"{gibibytes(budget)} there are; a step may run out of memory"
    return MemoryPlan(trainer=least, parts=parts, budget=budget, choices=choices)


def _keeping(plan: MemoryPlan, rehearsal: Rehearsal) -> MemoryPlan:
    """`plan` with dequantized weights kept in a share of the memory that it leaves."""
    wanted = rehearsal.dequantized(None)
    if not wanted:
        return plan
    trainer: Any = plan.trainer
    share = may_keep(plan.budget - with_room(plan.parts))
    size = rehearsal.dequantized(min(share, rehearsal.worth_keeping()))
    choice = f"{gibibytes(size)} of {gibibytes(wanted)} are kept"
    return attrs.evolve(
        plan,
        trainer=attrs.evolve(trainer, keep_dequantized=size / 2**30),
        parts={**plan.parts, "dequantized weights": size},
        choices={**plan.choices, "dequantized weights": choice},
    )


def _is_open(sft: SFT) -> bool:
    """Whether the user leaves open how many tokens go through the model at once."""
    return sft.micro_batch_size == "auto" and sft.packing is None


def _with(sft: SFT, **fields: Any) -> SFT:
    return attrs.evolve(sft, **fields)


def _fewer(tokens: int, parts: Mapping[str, int], budget: int) -> int:
    """So many tokens in a forward pass as may fit, at most half: what they take grows with them."""
    standing = sum(size for part, size in parts.items() if part in STANDING)
    share = max(0.0, budget - standing) / (1.1 * (sum(parts.values()) - standing))
    return min(tokens // 2, int(tokens * share))


def _fewest(
    every: SFT,
    needs: Callable[[SFT], Mapping[str, int]],
    layers: int,
    budget: int,
    none: Mapping[str, int],
    all_: Mapping[str, int],
) -> tuple[SFT, Mapping[str, int]]:
    """Recompute as few of the first layers as suffice: each saves about the same, so few tries are needed."""
    much, little = with_room(none), with_room(all_)
    count = max(1, math.ceil(layers * (much - budget) / max(1, much - little)))
    while count < layers:
        candidate = _with(every, gradient_checkpointing=count)
        parts = needs(candidate)
        if fits(parts, budget):
            return candidate, parts
        count += math.ceil(layers / 8)
    return every, all_


def _choices(asked: SFT, chosen: SFT, layers: int) -> dict[str, str]:
    """What was settled, in words."""
    found = {}
    if _is_open(asked):
        tokens, wanted = Limits.of(chosen).tokens, Limits.of(asked).tokens
        found["a forward pass"] = f"at most {tokens:,} tokens"
        if tokens < wanted:
            found["a forward pass"] += f" instead of {wanted:,}"
    if asked.gradient_checkpointing == "auto":
        count = chosen.recomputed_layers
        some = f"the first {count} of {layers} layers"
        found["gradient checkpointing"] = {0: "not needed", None: "all layers"}.get(count, some)
    return found
