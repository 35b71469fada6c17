"""The numerics of a pipeline, tried on its own model and a few of its rows: what `Pipeline.verify` does.

Two ways to one number are compared each time, by how much they differ. A line that fails stops no other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.common.random_states import random_states_kept, seed_everything
from tunekit.core.component import Context
from tunekit.core.data.batching import collate
from tunekit.core.data.codec import Codec
from tunekit.core.evaluation.predicting import evaluating, pad_id, trying
from tunekit.core.interfaces import AdapterMethod, Encoded, Quantizer, Trainer
from tunekit.core.lean.trial import stirred
from tunekit.core.model import attaching
from tunekit.core.model.dequantize import empty
from tunekit.core.model.plain import plain, where
from tunekit.core.registry import Registry
from tunekit.core.run import checkpoint, files
from tunekit.core.run.checkpoint import Checkpoint, checksum, trained_parameters
from tunekit.core.run.observers import Observers
from tunekit.core.run.run_log import RunLog
from tunekit.core.run.verification import Verification, VerifiedLine, known, line
from tunekit.core.training import rows_loss
from tunekit.core.training.prefixes import sharing
from tunekit.core.training.rows_loss import RowsLoss
from tunekit.errors import NotSupported

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

BOUNDS = {"logits": (1e-5, 1e-2), "gradients": (1e-4, 5e-2), "merged": (1e-4, 1e-4)}
"""Relative differences that are rounding alone: of float32, and of bfloat16 and float16. Merging is in float32."""

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

    def verification(self) -> Verification:
        """Every line; random states are afterwards as they were, and nothing is left on the disk."""
        with random_states_kept(), tempfile.TemporaryDirectory(prefix="tunekit-verify-") as place:
            self.place = Path(place)
            _ = self._fresh  # what keeps a run from starting is raised here, too
            return Verification(lines=tuple(self._lines()))

    def _lines(self) -> Iterator[VerifiedLine]:
        half = self.context.dtype != "float32"
        logits, gradients, merged = (pair[half] for pair in BOUNDS.values())
        yield line("start == base", logits, self._start)
        yield line("accumulation 1xN == Nx1", gradients, self._accumulation)
        yield line("padding-free == padded", gradients, partial(self._way, "padding_free"))
        yield line("chunked loss == plain loss", gradients, partial(self._way, "chunked"))
        yield line("shared prefix == each its own", gradients, partial(self._way, "shared"))
        yield line("lean forwards == usual ones", gradients, partial(self._way, "lean"))
        yield line("base untouched", 0, self._base_untouched)
        yield line("saved == loaded", logits, self._saved)
        yield line("merged == live", merged, self._merged)
        yield line("resumed == uninterrupted", 0, self._resumed)

    # What is measured -------------------------------------------------------------------------------------------------

    def _start(self) -> float:
        if not self.adapter.starts_as_base:
            raise NotSupported(f"{self.adapter.name} does not start as its base")
        model, base_logits = self._fresh
        return _away(self._logits(model), base_logits)

    def _accumulation(self) -> float:
        names = [field.name for field in attrs.fields(type(self.trainer))]
        if "micro_batch_size" not in names:
            raise NotSupported(f"{self.trainer.name} has no micro_batch_size")
        whole, split = (self._gradients_of_a_step(size) for size in (len(self.rows), 1))
        return max(_away(split[name], whole[name], whole.values()) for name in whole)

    def _way(self, way: str) -> float:
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
        plain = RowsLoss(model=model, pad_id=fill, device=device)
        with stirred(list(trained_parameters(model).values())):
            (loss, slopes), (usual, expected) = (self._loss_and_gradients(found) for found in (chosen, plain))
        gradients = [_away(slopes[name], expected[name], expected.values()) for name in expected]
        return max(_away(loss, usual), *gradients)

    def _base_untouched(self) -> float:
        return float(self._trained["moved"])

    def _saved(self) -> float:
        if "unsaved" in self._trained:
            raise self._trained["unsaved"]
        loaded = attaching.load(self.adapter, self.load(), self._adapter, self.context)
        return _away(self._logits(loaded), self._trained["logits"])

    def _merged(self) -> float:
        if "unsaved" in self._trained:
            raise NotSupported("it could not be saved")
        base = self.load()
        device = where(sum(p.numel() for p in empty(base).parameters()), self.context.device)
        base = plain(base, self.quantizer, device)
        live = attaching.load(self.adapter, base, self._adapter, self.context).eval()
        before = self._logits(live)
        merged = self.adapter.merge(live, attrs.evolve(self.context, quantization=None, dtype="float32"))
        return _away(self._logits(merged), before)

    def _resumed(self) -> float:
        stored: Checkpoint | None = self._trained["checkpoint"]
        if stored is None:
            raise NotSupported(f"{self.trainer.name} wrote no checkpoint to go on from")
        model = self._attached(self.load())
        stored.load_parameters(model)
        self.adapter.load_train_state(model, stored.state["method"])
        seed_everything(self.context.seed + 1)  # what it draws from is the checkpoint's
        self._fit(model, self.place / "resumed", resumed=stored)
        ended: Mapping[str, Tensor] = self._trained["parameters"]
        return max(_away(value, ended[name], absolute=True) for name, value in trained_parameters(model).items())

    # How --------------------------------------------------------------------------------------------------------------

    @cached_property
    def _fresh(self) -> tuple[nn.Module, Tensor]:
        """The method on its base, for all lines that leave it as it was before the first step; the base's logits."""
        base = self.load()
        base_logits = self._logits(base)
        return self._attached(base), base_logits

    def _attached(self, base: PreTrainedModel) -> nn.Module:
        seed_everything(self.context.seed)
        return attaching.attach(self.adapter, base, self.context)

    def _logits(self, model: nn.Module) -> Tensor:
        """What it predicts for the rows, (rows, time, vocabulary) in float32, padding set to zero."""
        batch = collate(self.rows, pad_id(self.codec.tokenizer), str(next(model.parameters()).device))
        batch.pop("labels")
        with evaluating(model):
            found: Tensor = model(**batch, use_cache=False).logits.float() * batch["attention_mask"][:, :, None]
        return found

    def _loss_and_gradients(self, way: RowsLoss) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of all rows and its gradients, without dropout."""
        model = way.model
        model.eval()
        with way.training():
            loss = way(model, self.rows)
            loss.backward()
        return loss.detach(), _take_gradients(model)

    def _gradients_of_a_step(self, size: int) -> dict[str, Tensor]:
        """Those of the trainer's first step on all rows, so many of them in one forward pass, without dropout."""
        found: dict[str, Tensor] = {}

        def after_step(model: nn.Module, step: int) -> None:
            found.update(_take_gradients(model))
            raise _EnoughError

        model, _ = self._fresh
        one = {"micro_batch_size": size, "batch_size": len(self.rows), "max_grad_norm": float("inf")}
        with trying(model):
            self._fit(model, self.place / f"of-{size}", after_step=after_step, changes=one)
        return found

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
        self.__dict__.pop("_fresh", None)  # one model at a time
        base = self.load()
        weights = dict(base.named_parameters())
        model = self._attached(base)
        kept = {name: checksum(value) for name, value in weights.items() if not value.requires_grad}
        before = self._logits(model)
        self._fit(model, self.place / "trained")
        stored = checkpoint.newest(self.place / "trained" / files.CHECKPOINTS)
        found = {
            "logits": self._logits(model),
            "learned": _away(self._logits(model), before),
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
    def _adapter(self) -> Path:
        """The saved adapter; NotSupported if the steps left no mark by which it could be told from another."""
        learned = self._trained["learned"]
        if learned <= BOUNDS["logits"][self.context.dtype != "float32"]:
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


def _away(found: Tensor, expected: Tensor, all_expected: Any = None, absolute: bool = False) -> float:
    """The largest difference of two tensors, relative to the largest number expected, here or in `all_expected`."""
    if found.shape != expected.shape:
        return float("inf")
    away = float((found.detach().float() - expected.detach().float()).abs().max())
    largest = max(float(value.detach().abs().max()) for value in (all_expected or [expected]))
    return away if absolute else away / max(largest, 1e-12)


def _take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of what is trained, by name, taken off the model."""
    found = {n: p.grad.detach().clone() for n, p in trained_parameters(model).items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
