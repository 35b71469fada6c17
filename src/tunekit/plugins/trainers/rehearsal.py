"""A step of SFT rehearsed on the meta device: what it does and in what order, with nothing computed or held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.component import Context
from tunekit.core.data import batching
from tunekit.core.data.codec import IGNORED
from tunekit.core.evaluation.predicting import pad_id
from tunekit.core.interfaces import Encoded, Quantizer
from tunekit.core.lean.forwards import kept_bytes_of, worth_keeping
from tunekit.core.training.compiled import worthwhile
from tunekit.core.training.rows_loss import RowsLoss
from tunekit.plugins.trainers import optimization
from tunekit.plugins.trainers.micro_batches import heaviest
from tunekit.plugins.trainers.recomputing import activations_computed_again

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from tunekit.core.memory.live_bytes import LiveBytes
    from tunekit.plugins.trainers.sft import SFT


@attrs.define(kw_only=True, eq=False)
class Rehearsal:
    """The step of a run that needs the most memory; see `parts`.

    Args:
        model: on the meta device, see `core.memory.weightless`.
        train: encoded rows.
        way: to the loss.
        optimizer: bytes of its states.
        moving: bytes that it takes for itself while it moves the parameters.
        context: the facts of the run.
    """

    model: nn.Module
    train: Sequence[Encoded]
    way: RowsLoss
    optimizer: int
    moving: int
    context: Context
    _gone: bool = attrs.field(default=False, init=False)

    @classmethod
    def of(
        cls,
        sft: SFT,
        model: nn.Module,
        train: Sequence[Encoded],
        tokenizer: PreTrainedTokenizerBase,
        quantizer: Quantizer | None,
        context: Context,
    ) -> Rehearsal:
        """The rehearsal of a run of `sft`; `model` is on the meta device, and used up."""
        from tunekit.core.memory.weightless import pack

        states, moving = _moving(sft, model, context.device)
        if quantizer:
            pack(model, quantizer, context.device)
        model.train()
        way = RowsLoss(
            model=model,
            pad_id=pad_id(tokenizer),
            device="meta",
            padding_free=sft.padding_free,
            chunked=sft.chunked_loss,
            # Compiled layers are PEFT's.
            lean=sft.lean and not worthwhile(sft.compile, sft.planned_steps(len(train))),
            kept_bytes=0,  # they are counted by themselves
        )
        return cls(model=model, train=train, way=way, optimizer=states, moving=moving, context=context)

    def dequantized(self, room: int | None) -> int:
        """Bytes of the weights that lean layers keep dequantized, where they may take so many; None for all there are.

        Rehearsed is a step that keeps none: with them, it does not make them again, which takes no more.
        """
        return kept_bytes_of(self.model, self.context.dtype, room) if self.way.lean else 0

    def worth_keeping(self) -> int:
        """The most bytes of dequantized weights that are kept by choice."""
        return worth_keeping(self.model, self.context.device)

    def parts(self, sft: SFT) -> dict[str, int]:
        """Bytes by part when they are most, in a step of `sft`.

        The way to the loss is the quickest that the model can go, as far as shapes tell: `rows_loss.choose`, in a run,
        looks at the numbers too. Raises whatever the model raises on the plain way: NotSupported, for one, where it
        knows no gradient checkpointing.
        """
        first, later, labels = heaviest(self.train, sft, self.context.seed, padded=not self.way.padding_free)
        gradients = sum(p.numel() * p.element_size() for p in self._trained)
        try:
            live = self._of_pass(sft, _supervised(self._rows(first), labels[0]), later=False)
            # Later passes of a step have its gradients beside them: where those are something, they may need more.
            if later and gradients > NOTHING * live.peak:
                with_gradients = self._of_pass(sft, _supervised(self._rows(later), labels[1]), later=True)
                live = max(live, with_gradients, key=lambda each: each.peak)
        except Exception as error:  # whatever a model of somebody else's raises, there is the plain way
            quicker = [name for name in ("lean", "padding_free", "chunked") if getattr(self.way, name)]
            if self._gone or not quicker:
                raise
            note = f"no {quicker[0]}: {type(error).__name__}: {error}".splitlines()[0]
            self.way = attrs.evolve(self.way, **{quicker[0]: False}, notes=[*self.way.notes, note])  # type: ignore[arg-type]
            return self.parts(sft)
        self._gone = True
        parts = {part: live.at_peak.get(part, 0) for part in PARTS}
        if sft.kept_bytes is not None:
            parts["dequantized weights"] = self.dequantized(sft.kept_bytes)
        moving = {"gradients": gradients, "activations": 0, "logits": 0, "workspace": self.moving}
        return max(parts, parts | moving, key=lambda found: sum(found.values()))

    @property
    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _is_windowed(self) -> bool:
        """Whether attention is not that of torch's kernels in rows of any length."""
        config = self.model.config.get_text_config()
        return any(getattr(config, name, None) for name in ("sliding_window", "attn_logit_softcapping"))

    def _rows(self, places: Sequence[int]) -> list[Encoded]:
        return [self.train[at] for at in places]

    def _of_pass(self, sft: SFT, rows: Sequence[Encoded], *, later: bool, join: bool = True) -> LiveBytes:
        """One forward and backward pass over `rows`, counted.

        Args:
            sft: how much is recomputed.
            rows: in the pass.
            later: whether the step had passes before, whose gradients are there.
            join: whether a few long rows may stand for many short ones.
        """
        import torch

        from tunekit.core.memory.live_bytes import LiveBytes
        from tunekit.core.memory.weightless import STATE, AsOnDevice

        live = LiveBytes("activations")
        live.hold([*self.model.parameters(), *self.model.buffers()], "frozen weights")
        live.hold(self._trained, "trained weights")
        live.hold(
            [b for name, b in self.model.named_buffers() if name.rpartition(".")[2] == STATE], "quantization state"
        )
        as_on_device = AsOnDevice(self.context.device)
        recomputing = activations_computed_again(self.model, sft.recomputed_layers, lambda: as_on_device)
        taken = _joined(rows) if self.way.padding_free and join and not self._is_windowed() else rows
        states = torch.empty(self.optimizer, dtype=torch.uint8, device="meta")
        with as_on_device, _marked(self.model, live), self.way.training(), recomputing:
            live.hold([states], "optimizer")
            for parameter in self._trained if later else []:
                parameter.grad = torch.empty_like(parameter)
                live.hold([parameter.grad], "gradients")
            try:
                with live:
                    loss = self.way(self.model, taken) / 1
                    with live.making("workspace"):
                        loss.backward()
            finally:
                for parameter in self._trained:
                    parameter.grad = None
        if as_on_device.plain and len(taken) < len(rows):
            return self._of_pass(sft, rows, later=later, join=False)
        return live


PARTS = (
    "frozen weights",
    "quantization state",
    "dequantized weights",
    "trained weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "workspace",
)
"""What memory is needed for. What the backward pass makes, layers that are computed again among it, is workspace."""


NOTHING = 0.02
"""A share of the peak that does not matter."""
SEGMENTS = 4
"""So many rows at most are rehearsed end to end: torch's kernels for attention keep as much of one long row as of many
short ones, and each costs time here."""


def _supervised(rows: Sequence[Encoded], count: int) -> list[Encoded]:
    """The rows with labels on more of their tokens, until so many are supervised."""
    missing = count - sum(map(batching.supervised_tokens, rows))
    found: list[Encoded] = []
    for row in rows:
        labels = list(row["labels"])
        for at in range(1, len(labels)):
            if missing > 0 and labels[at] == IGNORED:
                labels[at], missing = row["input_ids"][at], missing - 1
        found.append({"input_ids": row["input_ids"], "labels": labels})
    return found


def _joined(rows: Sequence[Encoded]) -> list[Encoded]:
    """As many tokens, supervised ones too, in a few rows."""
    each = -(-len(rows) // SEGMENTS)
    groups = [rows[start : start + each] for start in range(0, len(rows), each)]
    return [{name: [n for row in group for n in row[name]] for name in ("input_ids", "labels")} for group in groups]


@contextmanager
def _marked(model: nn.Module, live: LiveBytes) -> Iterator[None]:
    """Within it, what is made from the output layer on counts as logits, and what gathers in `.grad` as gradients."""

    def at_head(*_: object) -> None:
        live.part = "logits"

    def kept(parameter: nn.Parameter) -> None:
        live.hold([parameter.grad], "gradients")  # there is one when this is called

    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    hooks = [head.register_forward_pre_hook(at_head)] if head is not None else []
    hooks += [p.register_post_accumulate_grad_hook(kept) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _moving(sft: SFT, model: nn.Module, device: str) -> tuple[int, int]:
    """Bytes of the optimizer's states, and those that it takes for itself while it moves the parameters."""
    import torch

    from tunekit.core.memory.live_bytes import LiveBytes

    optimizer = optimization.make(sft.optimizer, model, 1.0, sft.weight_decay)
    states = optimization.size(optimizer)
    on_cuda, kind = device.startswith("cuda"), type(optimizer)
    if on_cuda and optimization.knows(kind, "fused"):
        return states, 0  # all in one pass, in place
    together = on_cuda and optimization.knows(kind, "foreach")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not together:  # one after the other: the one that takes the most
        trained = list({(p.shape, p.dtype): p for p in trained}.values())
    stand_ins = [torch.nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in trained]
    for parameter in stand_ins:
        parameter.grad = torch.empty_like(parameter)
    alone = kind(stand_ins, lr=1.0, **({"foreach": True} if together else {}))
    live = LiveBytes("workspace")
    live.hold([*stand_ins, *(parameter.grad for parameter in stand_ins)], "there")
    # Not every optimizer can do without numbers; what is counted by then is what there is to know.
    with suppress(RuntimeError, NotImplementedError):
        alone.step()
        live.hold([t for state in alone.state.values() for t in state.values() if isinstance(t, torch.Tensor)], "there")
        with live:
            alone.step()
    return states, live.most["workspace"]
