"""The training loop of SFT, to be read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import attrs

from tunekit.core.component import Context
from tunekit.core.data import batching
from tunekit.core.evaluation.predicting import pad_id
from tunekit.core.interfaces import Encoded
from tunekit.core.lean.forwards import drop_kept
from tunekit.core.outcomes import TrainResult
from tunekit.core.run.checkpoint import checksums
from tunekit.core.run.signals import asked_to_stop
from tunekit.core.training import rows_loss, sharded
from tunekit.core.training.compiled import worthwhile
from tunekit.core.training.parallel import not_followed, started
from tunekit.core.training.prefixes import sharing
from tunekit.core.training.rows_loss import RowsLoss
from tunekit.errors import NotSupported, TrainingError
from tunekit.plugins.trainers import micro_batches, optimization
from tunekit.plugins.trainers.micro_batches import Limits, exchanged, learn, smallest
from tunekit.plugins.trainers.recomputing import activations_computed_again
from tunekit.plugins.trainers.schedules import schedule
from tunekit.plugins.trainers.so_far import WAYS_OUT, SoFar, what_is_not_finite
from tunekit.plugins.trainers.upcoming import StepRows, upcoming

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import PreTrainedTokenizerBase

    from tunekit.core.run.run_log import RunLog
    from tunekit.plugins.trainers.sft import SFT


def fit(
    sft: SFT,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Encoded],
    *,
    after_step: Callable[[nn.Module, int], None],
    extra_loss: Callable[[nn.Module], Tensor | None],
    validate: Callable[[], Mapping[str, float]] | None,
    run: RunLog,
    context: Context,
) -> TrainResult:
    """Train `model` in place as `sft` says; see `Trainer.fit` for the arguments.

    Raises TrainingError for a loss or gradient that is not finite.
    """
    from torch.nn.utils import clip_grad_norm_

    steps, processes = sft.planned_steps(len(train)), started()
    save_every = sft.save_every or batching.steps_per_epoch(len(train), sft.batch_size)
    peak = sft.peak_learning_rate(context)
    share = schedule(sft.schedule, sft.warmup, steps)
    optimizer = optimization.make(sft.optimizer, model, peak, sft.weight_decay)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lengths = batching.lengths(train)
    order = batching.RowOrder(lengths=lengths, batch_size=sft.batch_size, seed=context.seed, order=sft.order)
    so_far = SoFar(limits=Limits.of(sft), recomputed=sft.recomputed_layers, kept_bytes=sft.kept_bytes)
    if run.resumed:
        so_far = SoFar.resumed(run.resumed.state["trainer"]["so_far"], sft)
        optimization.restore(optimizer, run.resumed.state["trainer"]["optimizer"])
    for note in not_followed():
        run.note(note)
    if pieces := sharded.in_pieces(model):
        run.note(sharded.share_of(model))
    summed_loss = _summed_loss(sft, model, tokenizer, train, order.of_step(1), so_far.kept_bytes, run, context)
    if summed_loss.apart:
        so_far.limits = attrs.evolve(so_far.limits, rows=1)
    if sft.cache_frozen_layers:
        if pieces:
            raise NotSupported("cache_frozen_layers: the model is cut among processes; leave that out")
        summed_loss = rows_loss.over_frozen(summed_loss, train, run.directory)
        for note in summed_loss.notes:
            run.note(note)
    model.train()
    run.draw(context.seed)  # last: nothing else may draw random numbers

    saved_at = time.monotonic()
    recomputing = activations_computed_again(model, so_far.recomputed)
    to_do = range(run.resumed.step + 1 if run.resumed else 1, (so_far.stopped_at or steps) + 1)
    make = lambda step: StepRows.of(order.of_step(step), train, so_far.limits, processes, summed_loss)  # noqa: E731
    with (
        summed_loss.training(),
        recomputing,
        closing(upcoming(make, to_do, context.device, beside=sft.prefetch)) as coming,
        asked_to_stop() as asked,
    ):
        for step, given in zip(to_do, coming, strict=True):
            attempt = partial(
                learn,
                step,
                given.share,
                given.read,
                so_far.limits,
                padded=not summed_loss.padding_free,
                loss=partial(given.loss, model),
                backward=lambda loss: loss.backward(),
                clear=partial(_clear, optimizer, model),
                most=(lambda passes: max(processes.gather(passes))) if pieces else None,
            )
            shares = exchanged(processes, attempt, context.device, alone=pieces)
            so_far.limits = smallest([share.limits for share in shares])
            for note in [note for share in shares for note in share.notes]:
                run.note(note)
            # Once a step: on the first process alone, since what all have is added up.
            extra = extra_loss(model) if processes.is_first else None
            if extra is not None:
                extra.backward()
            processes.add_gradients(trained)
            length = clip_grad_norm_(trained, sft.max_grad_norm)
            losses, norm = micro_batches.read(shares, length)
            loss = sum(part for part, _ in losses)
            rate = peak * share(step - 1)
            for group in optimizer.param_groups:
                group["lr"] = rate
            wrong = what_is_not_finite(step, losses, norm, given.read, tokenizer)
            if wrong and sft.on_nonfinite == "stop":
                raise TrainingError(f"{wrong}. Nothing was learned from this step; {WAYS_OUT}")
            if wrong:
                so_far.skipped += 1
                run.note(f"skipped {wrong}")
                run.log(step, {"skipped": 1, "learning_rate": rate, "tokens": given.tokens})
            else:
                so_far.loss = loss
                optimizer.step()
                after_step(model, step)
            optimizer.zero_grad()

            if not wrong and (step % sft.log_every == 0 or step == steps):
                run.log(step, {"loss": loss, "learning_rate": rate, "grad_norm": norm, "tokens": given.tokens})
            is_best = False
            if validate and _evaluates(sft, step, steps):
                with summed_loss.paused():
                    measured = validate()
                run.log(step, {f"validation/{name}": value for name, value in measured.items()})
                is_best = so_far.is_best(sft, step, measured, context)
                if step < steps and so_far.stops(sft, step, measured, context):
                    run.log(step, {"stopped": 1})
            due = step % save_every == 0 or time.monotonic() - saved_at >= 60 * (sft.save_minutes or math.inf)
            # Signals and clocks are of one process; what they ask for, all do at the same step.
            asks = processes.gather((asked.by, due))
            stop, due = next((by for by, _ in asks if by), None), asks[0][1]
            last = step in (steps, so_far.stopped_at)
            if ((due or is_best) and not last) or stop:
                way = {name: getattr(summed_loss, name) for name in rows_loss.SETTLED}
                state = {"optimizer": optimizer.state_dict(), "so_far": attrs.asdict(so_far), "loss": way}
                beside = sft.background_saving
                run.save(step, model, state, sft.keep, so_far.best_step, background=beside)
                saved_at = time.monotonic()
            if stop:
                run.settle()
                asked.by = stop
                asked.leave()
            if last:
                break
    run.settle()
    ended = so_far.stopped_at or steps
    notes = so_far.notes | so_far.restore_best(sft, ended, run, model)
    for note in notes.values():
        run.note(note)
    processes.check_same("what was trained", checksums(model) if processes.count > 1 else None)
    return TrainResult(steps=ended, metrics=so_far.metrics(sft.keep_best), notes=notes)


def _summed_loss(
    sft: SFT,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Encoded],
    first: Sequence[int],
    kept_bytes: int | None,
    run: RunLog,
    context: Context,
) -> RowsLoss:
    """The way to the loss, the `first` step's rows looked at; a resumed run goes the way it went, to the last bit."""
    fill = pad_id(tokenizer)
    whole = not sharded.in_pieces(model)  # lean forwards keep weights, and compiled layers would be tried on pieces
    lean, compiling = sft.lean and whole, worthwhile(sft.compile, sft.planned_steps(len(train))) and whole
    if run.resumed:
        way = run.resumed.state["trainer"]["loss"]
        allowed = {"padding_free": sft.padding_free, "chunked": sft.chunked_loss, "shared": sft.shared_prefix}
        allowed |= {"lean": lean, "compiled": compiling, "apart": True}
        way = {name: bool(value and allowed[name]) for name, value in way.items()}
        return RowsLoss(model=model, pad_id=fill, device=context.device, kept_bytes=kept_bytes, **way)
    found = rows_loss.choose(
        model,
        batching.shortest_and_longest(train),
        fill,
        context.device,
        padding_free=sft.padding_free,
        chunked=sft.chunked_loss,
        lean=lean,
        compiling=compiling,
        sharing=sharing([train[at] for at in first]) if sft.shared_prefix else (),
        kept_bytes=kept_bytes,
    )
    for note in found.notes:
        run.note(note)
    return found


def _evaluates(sft: SFT, step: int, steps: int) -> bool:
    """Whether `step` is evaluated; where the best is kept, the last one is, which may be it."""
    if not sft.evaluate_every:
        return False
    return step % sft.evaluate_every == 0 or (bool(sft.keep_best) and step == steps)


def _clear(optimizer: Optimizer, model: nn.Module) -> bool:
    """Take all gradients away, and weights that are kept dequantized; whether there were any of these."""
    optimizer.zero_grad()
    return drop_kept(model)
