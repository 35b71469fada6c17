"""The numerics of a pipeline, tried on its own model and a few of its rows: what `Pipeline.verify` does.

Two ways to the same numbers are compared each time, by the error of each against float64: the one that is asked about
may hardly be further from it than the plain one. A line that fails stops no other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.common.fixed_order import in_fixed_order
from tunekit.core.common.random_states import random_states_kept, seed_everything
from tunekit.core.component import Context
from tunekit.core.data.batching import collate
from tunekit.core.data.codec import Codec
from tunekit.core.evaluation.predicting import pad_id, trying
from tunekit.core.interfaces import AdapterMethod, Encoded, Quantizer, Trainer
from tunekit.core.model import attaching
from tunekit.core.model.dequantize import empty
from tunekit.core.model.plain import plain, where
from tunekit.core.registry import Registry
from tunekit.core.run import checkpoint, files
from tunekit.core.run.checkpoint import Checkpoint, checksum, trained_parameters
from tunekit.core.run.compared import Accuracy, accuracy, apart, away, logits, measured
from tunekit.core.run.observers import Observers
from tunekit.core.run.run_log import RunLog
from tunekit.core.run.verification import Measured, Verification, VerifiedLine, known, line
from tunekit.core.training import rows_loss
from tunekit.core.training.accuracy import Found, Measure, rounding, trained, worst
from tunekit.core.training.prefixes import sharing
from tunekit.core.training.rows_loss import RowsLoss
from tunekit.errors import NotSupported

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

LOOKED_AT = 1 << 28
"""Numbers that are trained and whose gradients are compared, at most: 1 GiB of them each time."""
WAYS = {
    "padding_free": ("padding_free", ""),
    "chunked": ("chunked_loss", ""),
    "shared": ("shared_prefix", "no rows begin alike for so long"),
    "lean": ("lean", "none is known for its layers"),
}
"""Of each way to the loss: the field of a trainer that asks for it, and why a model may have no use for it."""


@attrs.define(kw_only=True, eq=False, slots=False)
class Bench:
    """The parts of a pipeline, and what is measured on them, each model loaded afresh from `load`.

    Args:
        adapter: the method.
        quantizer: how the base is stored; None for a plain one.
        trainer: the loop.
        codec: tokenizer and template.
        rows: encoded rows.
        context: the facts of a run.
        load: gives the base, as a run loads it.
        place: a directory to write into.
    """

    adapter: AdapterMethod
    quantizer: Quantizer | None
    trainer: Trainer
    codec: Codec
    rows: Sequence[Encoded]
    context: Context
    load: Callable[[], PreTrainedModel]
    place: Path = Path()
    _ended: dict[str, Any] | None = attrs.field(default=None, init=False)
    _changed: bool = attrs.field(default=False, init=False)  # whether the method puts something else into the base

    def verification(self) -> Verification:
        """Every line; random states are afterwards as they were, and nothing is left on the disk."""
        directory = tempfile.TemporaryDirectory(prefix="tunekit-verify-")
        with random_states_kept(), in_fixed_order(self.context.device), directory as place:
            self.place = Path(place)
            _ = self._fresh  # what keeps a run from starting is raised here, too
            return Verification(lines=tuple(self._lines()))

    def _lines(self) -> Iterator[VerifiedLine]:
        yield line("start == base", self._start)
        yield line("accumulation 1xN == Nx1", self._accumulation)
        yield line("padding-free == padded", partial(self._way, "padding_free"))
        yield line("chunked loss == plain loss", partial(self._way, "chunked"))
        yield line("shared prefix == each its own", partial(self._way, "shared"))
        yield line("lean forwards == usual ones", partial(self._way, "lean"))
        yield line("base untouched", self._base_untouched)
        yield line("saved == loaded", self._saved)
        yield line("merged == live", self._merged)
        yield line("resumed == uninterrupted", self._resumed)

    # What is measured -------------------------------------------------------------------------------------------------

    def _start(self) -> Measured:
        if not self.adapter.starts_as_base:
            raise NotSupported(f"{self.adapter.name} does not start as its base")
        model, found = self._fresh
        before = measured(found)
        return away(self._logits(model), before.logits), before.bound(self._changed)

    def _accumulation(self) -> Measured:
        names = [field.name for field in attrs.fields(type(self.trainer))]
        if "micro_batch_size" not in names:
            raise NotSupported(f"{self.trainer.name} has no micro_batch_size")
        model, _ = self._fresh
        whole, split = (self._gradients_of_a_step(size) for size in (len(self.rows), 1))
        from tunekit.core.training.float64 import in_float64

        with in_float64(model):
            true = self._gradients_of_a_step(len(self.rows))
        return worst(split, whole, true, rounding(model)).measured

    def _way(self, way: str) -> Measured:
        """The loss and its gradients the quick way and the plain one, with an adapter that is not as it started."""
        asked, otherwise = WAYS[way]
        if not getattr(self.trainer, asked, False):
            raise NotSupported(f"{self.trainer.name} trains without {asked}")
        model, _ = self._fresh
        fill, device = pad_id(self.codec.tokenizer), self.context.device
        wanted = {"padding_free": way in ("padding_free", "shared"), "chunked": way == "chunked", "lean": way == "lean"}
        alike = sharing(self.rows) if way == "shared" else ()
        chosen = rows_loss.choose(model, self.rows, fill, device, **wanted, sharing=alike)
        if not getattr(chosen, way):
            raise NotSupported(f"the run does not use it: {next(iter(chosen.notes), otherwise)}")
        measure = self._measure
        with chosen.training():
            return measure.worst(partial(chosen, model, self.rows)).measured

    def _base_untouched(self) -> Measured:
        return float(self._trained["moved"]), 0

    def _saved(self) -> Measured:
        if "unsaved" in self._trained:
            raise self._trained["unsaved"]
        loaded = attaching.load(self.adapter, self.load(), self._adapter, self.context)
        return away(self._logits(loaded), measured(self._trained["accuracy"]).logits), self._bound

    def _merged(self) -> Measured:
        if "unsaved" in self._trained:
            raise NotSupported("it could not be saved")
        base = self.load()
        device = where(sum(p.numel() for p in empty(base).parameters()), self.context.device)
        base = plain(base, self.quantizer, device)
        live = attaching.load(self.adapter, base, self._adapter, self.context).eval()
        before = measured(accuracy(live, self._batch(live)))
        merged = self.adapter.merge(live, attrs.evolve(self.context, quantization=None, dtype="float32"))
        return away(self._logits(merged), before.logits), before.bound(in_its_dtype=True)

    def _resumed(self) -> Measured:
        stored: Checkpoint | None = self._trained["checkpoint"]
        if stored is None:
            raise NotSupported(f"{self.trainer.name} wrote no checkpoint to go on from")
        model = self._attached(self.load())
        stored.load_parameters(model)
        self.adapter.load_train_state(model, stored.state["method"])
        seed_everything(self.context.seed + 1)  # what it draws from is the checkpoint's
        self._fit(model, self.place / "resumed", resumed=stored)
        ended: Mapping[str, Tensor] = self._trained["parameters"]
        return max(apart(value, ended[name]) for name, value in trained_parameters(model).items()), 0

    # How --------------------------------------------------------------------------------------------------------------

    @cached_property
    def _fresh(self) -> tuple[nn.Module, Accuracy | NotSupported]:
        """The method on its base, for all lines that leave it as it was before the first step; the base before."""
        base = self.load()
        before = accuracy(base, self._batch(base))
        weights = {name: (value, checksum(value)) for name, value in base.named_parameters()}
        model = self._attached(base)
        self._changed = any(checksum(value) != was for value, was in weights.values())
        return model, before

    @cached_property
    def _measure(self) -> Measure:
        """The plain way to the loss of all rows, and the truth."""
        model, _ = self._fresh
        plain = RowsLoss(model=model, pad_id=pad_id(self.codec.tokenizer), device=self.context.device)
        return Measure.of(model, partial(plain, model, self.rows), trained(model.named_parameters(), LOOKED_AT))

    def _attached(self, base: PreTrainedModel) -> nn.Module:
        seed_everything(self.context.seed)
        return attaching.attach(self.adapter, base, self.context)

    def _logits(self, model: nn.Module) -> Tensor:
        """What it predicts for the rows; see `logits`."""
        return logits(model, self._batch(model))

    def _batch(self, model: nn.Module) -> Mapping[str, Tensor]:
        batch = collate(self.rows, pad_id(self.codec.tokenizer), str(next(model.parameters()).device))
        batch.pop("labels")
        return batch

    def _gradients_of_a_step(self, size: int) -> Found:
        """Those of the trainer's first step on all rows, so many of them in one forward pass, without dropout."""
        found: dict[str, Tensor] = {}

        def after_step(model: nn.Module, step: int) -> None:
            found.update(
                {n: p.grad.detach().clone() for n, p in trained_parameters(model).items() if p.grad is not None}
            )
            raise _EnoughError

        model, _ = self._fresh
        one = {"micro_batch_size": size, "batch_size": len(self.rows), "max_grad_norm": float("inf")}
        with trying(model), tempfile.TemporaryDirectory(dir=self.place) as place:
            self._fit(model, Path(place) / "run", after_step=after_step, changes=one)
        model.zero_grad(set_to_none=True)
        return Found(0.0, found)

    @property
    def _trained(self) -> Mapping[str, Any]:
        """What a few steps end with; NotSupported where they failed, as the first line that asked for them has said."""
        if self._ended is None:
            self._ended = {}
            self._ended = self._train()
        if not self._ended:
            raise NotSupported(f"{self.trainer.name} took no steps")
        return self._ended

    def _train(self) -> dict[str, Any]:
        """A few steps: the logits, parameters and checkpoint they end with, and what they left in the base."""
        for name in ("_fresh", "_measure"):
            self.__dict__.pop(name, None)  # one model at a time
        base = self.load()
        weights = dict(base.named_parameters())
        model = self._attached(base)
        kept = {name: checksum(value) for name, value in weights.items() if not value.requires_grad}
        before = accuracy(model, self._batch(model))
        self._fit(model, self.place / "trained")
        stored = checkpoint.newest(self.place / "trained" / files.CHECKPOINTS)
        found: dict[str, Any] = {
            "before": before,
            "accuracy": accuracy(model, self._batch(model)),
            "parameters": {name: value.detach().clone() for name, value in trained_parameters(model).items()},
            "checkpoint": stored if stored and stored.step < self.context.total_steps else None,
            "moved": sum(checksum(weights[name]) != was for name, was in kept.items()),
        }
        directory = self.place / "adapter"
        directory.mkdir()
        try:
            self.adapter.save(model, directory)
        except Exception as error:  # told by the line that is about it
            found["unsaved"] = error
        return found

    @property
    def _bound(self) -> float:
        """How far logits after the steps may be from these."""
        return measured(self._trained["accuracy"]).bound(self._changed)

    @property
    def _adapter(self) -> Path:
        """The saved adapter; NotSupported if the steps left no mark by which it could be told from another."""
        before, after = (measured(self._trained[name]) for name in ("before", "accuracy"))
        learned = away(after.logits, before.logits)
        if learned <= self._bound:
            raise NotSupported(f"the steps moved the logits by {learned:.2g}: too little to compare")
        return self.place / "adapter"

    def _fit(
        self,
        model: nn.Module,
        directory: Path,
        *,
        resumed: Checkpoint | None = None,
        after_step: Callable[[nn.Module, int], None] | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> None:
        directory.mkdir()
        nobody = Registry(builtins={}, environment={"TUNEKIT_DISABLE_PLUGINS": "*"})
        run = RunLog(directory=directory, observers=Observers(nobody), resumed=resumed, device=self.context.device)
        run.method_state = partial(self.adapter.train_state, model)
        with suppress(_EnoughError):
            attrs.evolve(self.trainer, **known(self.trainer, changes or {})).fit(
                model,
                self.codec.tokenizer,
                self.rows,
                after_step=after_step or self.adapter.after_step,
                extra_loss=self.adapter.extra_loss,
                validate=None,
                run=run,
                context=self.context,
            )


class _EnoughError(Exception):
    """Ends a fit whose first step is all that is looked at."""
