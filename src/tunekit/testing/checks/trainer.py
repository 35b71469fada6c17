"""Checks of trainers: every row, every step and every slot of the adapter method, and nothing else."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from unittest import SkipTest

import attrs

from tunekit.core.interfaces import Trainer
from tunekit.core.outcomes import TrainResult
from tunekit.core.run.checkpoint import trained_parameters
from tunekit.errors import NotSupported
from tunekit.testing.checks.component import unchanged
from tunekit.testing.fitting import fit, fitted_once, trained_names
from tunekit.testing.harness import Harness
from tunekit.testing.training import changed, copies, distance

if TYPE_CHECKING:
    from torch import Tensor, nn


def takes_the_planned_steps(trainer: Trainer, harness: Harness) -> None:
    """`after_step` is called with 1, 2, ... up to `planned_steps`, and the result says so too."""
    fitted = fitted_once(trainer, harness)
    expected = list(range(1, fitted.planned + 1))
    assert fitted.steps == expected, (
        f"after_step was called with {_short(fitted.steps)}, and planned_steps({len(harness.rows)}) is "
        f"{fitted.planned}: call it once per optimizer step, counted from 1, and plan the steps as `fit` takes them"
    )
    assert isinstance(fitted.result, TrainResult), f"fit returned {fitted.result!r}: return a tunekit.TrainResult"
    assert fitted.result.steps == fitted.planned, (
        f"the result says {fitted.result.steps} steps, and {fitted.planned} were planned and taken"
    )


def keeps_the_slot(trainer: Trainer, harness: Harness) -> None:
    """`after_step` comes after `optimizer.step()`, while the gradients are still there."""
    fitted = fitted_once(trainer, harness)
    for step, grads in zip(fitted.steps, fitted.grads, strict=True):
        assert any(grad.any() for grad in grads.values()), (
            f"in after_step({step}) there are no gradients: call it before optimizer.zero_grad()"
        )
    late = changed(fitted.slots[-1], trained_parameters(fitted.model))
    assert not late, f"{late[:3]} still changed after the last after_step: call it after optimizer.step()"


def trains_only_what_is_trainable(trainer: Trainer, harness: Harness) -> None:
    """Parameters without requires_grad stay bit for bit; others change."""
    fitted = fitted_once(trainer, harness)
    after = dict(fitted.model.named_parameters())
    trained = trained_names(fitted.model)
    moved = [name for name in changed(fitted.before, after) if name not in trained]
    assert not moved, f"{moved[:3]} have requires_grad=False and changed: give the optimizer only what is trainable"
    assert changed(fitted.before, after), "no parameter changed: is the learning rate 0?"


def leaves_requires_grad_and_device(trainer: Trainer, harness: Harness) -> None:
    """What is trainable is so afterwards, and the model is where it was."""
    fitted = fitted_once(trainer, harness)
    assert set(trained_parameters(fitted.model)) == trained_names(fitted.model), (
        "fit changed requires_grad of parameters"
    )
    devices = {parameter.device.type for parameter in fitted.model.parameters()}
    assert devices == {"cpu"}, f"the model was on the CPU, and afterwards is on {sorted(devices)}: use context.device"


def logs_finite_numbers(trainer: Trainer, harness: Harness) -> None:
    """At least one line is logged; its numbers are finite and its step is one that was taken."""
    fitted = fitted_once(trainer, harness)
    assert fitted.logged, "nothing was logged: call run.log(step, {'loss': ...})"
    for line in fitted.logged:
        assert 1 <= line["step"] <= fitted.planned, f"it logged step {line['step']} of {fitted.planned}"
        assert len(line) > 1, f"it logged a line without metrics: {line}"
        assert all(math.isfinite(value) for value in line.values()), f"it logged {line}: numbers must be finite"


def is_deterministic(trainer: Trainer, harness: Harness) -> None:
    """The same seed ends with the same parameters."""
    first, second = fitted_once(trainer, harness), fit(trainer, harness)
    differing = changed(copies(trained_parameters(first.model)), trained_parameters(second.model))
    assert not differing, (
        f"the same seed ended with different {differing[:3]}: order the rows by context.seed, and draw from torch's "
        "global generator"
    )


def uses_every_row(trainer: Trainer, harness: Harness) -> None:
    """Every row is learned from, those of the last, smaller batch too."""
    fitted = fitted_once(trainer, harness)
    seen = [" " + " ".join(map(str, ids)) + " " for ids in fitted.seen]
    unused = [
        number
        for number, row in enumerate(harness.encoded(trainer), start=1)
        if not any(" " + " ".join(map(str, row["input_ids"])) + " " in ids for ids in seen)
    ]
    assert not unused, (
        f"rows {unused} of {len(harness.rows)} were never in a batch: keep the last batch of an epoch though it is "
        "smaller (and check a trainer that takes at least one whole epoch)"
    )


def adds_the_extra_loss_once_a_step(trainer: Trainer, harness: Harness) -> None:
    """`extra_loss` is called once an optimizer step and its gradient taken; or it is NotSupported."""
    import torch

    calls: list[int] = []
    weight = torch.nn.Parameter(torch.ones(1))

    def extra_loss(model: nn.Module) -> Tensor:
        calls.append(1)
        return weight.sum()

    try:
        fitted = fit(trainer, harness, extra_loss=extra_loss, probe=weight)
    except NotSupported:
        return
    assert len(calls) == fitted.planned, (
        f"extra_loss was called {len(calls)} times in {fitted.planned} steps: call it once per optimizer step, not per "
        "forward pass"
    )
    assert all("probe" in grads and grads["probe"].any() for grads in fitted.grads), (
        "the extra loss had no gradient: add it to the loss, or call backward() on it"
    )


def splits_rows_freely(trainer: Trainer, harness: Harness) -> None:
    """How many rows are in one forward pass does not change the gradient of a step."""
    if "micro_batch_size" not in {field.name for field in attrs.fields(type(trainer))}:
        raise SkipTest("it has no field micro_batch_size")
    first, second = (
        fit(attrs.evolve(trainer, micro_batch_size=size), harness).grads[0]  # type: ignore[call-arg]
        for size in (1, len(harness.rows))
    )
    away = max(distance(first[name], second[name]) for name in first)
    assert away <= 1e-5, (
        f"the gradients of step 1 differ by {away:.2g} between micro_batch_size 1 and {len(harness.rows)}: divide the "
        "summed loss of every forward pass by the supervised tokens of the whole step, not each by its own"
    )


def is_stateless(trainer: Trainer, harness: Harness) -> None:
    """Training leaves it as it was."""
    with unchanged(trainer):
        fit(trainer, harness)


def _short(steps: list[int]) -> str:
    return str(steps) if len(steps) <= 8 else f"[{steps[0]}, {steps[1]}, ..., {steps[-1]}]"


CHECKS = (
    takes_the_planned_steps,
    keeps_the_slot,
    trains_only_what_is_trainable,
    leaves_requires_grad_and_device,
    logs_finite_numbers,
    is_deterministic,
    uses_every_row,
    adds_the_extra_loss_once_a_step,
    splits_rows_freely,
    is_stateless,
)
