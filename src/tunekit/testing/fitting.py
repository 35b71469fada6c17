"""What the checks of trainers look at: a trainer at work on the tiny model, and a note of all it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.common.random_states import seed_everything
from tunekit.core.interfaces import Trainer
from tunekit.core.outcomes import TrainResult
from tunekit.core.run import files
from tunekit.core.run.checkpoint import trained_parameters
from tunekit.testing.harness import Harness, run_log
from tunekit.testing.training import copies

if TYPE_CHECKING:
    from torch import Tensor, nn


@attrs.define(kw_only=True)
class Fitted:
    """What a check can see of one `fit`.

    Args:
        model: the trained model; the last of its two layers is trained.
        planned: what `planned_steps` said.
        steps: the step numbers that `after_step` was called with.
        before: the parameters at the start.
        slots: the trainable parameters in each `after_step`.
        grads: their gradients there.
        seen: the token ids of every forward pass, one list a row.
        logged: what was logged.
        result: what `fit` returned.
    """

    model: nn.Module
    planned: int
    before: dict[str, Tensor]
    steps: list[int] = attrs.field(factory=list)
    slots: list[dict[str, Tensor]] = attrs.field(factory=list)
    grads: list[dict[str, Tensor]] = attrs.field(factory=list)
    seen: list[list[int]] = attrs.field(factory=list)
    logged: list[dict[str, float]] = attrs.field(factory=list)
    result: TrainResult | None = None


def fitted_once(trainer: Trainer, harness: Harness) -> Fitted:
    """One `fit` for all the checks that only look at what happened."""
    if harness.memory.get("trainer") is not trainer:
        harness.memory.update(trainer=trainer, fitted=fit(trainer, harness))
    found: Fitted = harness.memory["fitted"]
    return found


def fit(
    trainer: Trainer,
    harness: Harness,
    *,
    extra_loss: Callable[[nn.Module], Tensor | None] = lambda model: None,
    probe: nn.Parameter | None = None,
) -> Fitted:
    """Train the last layer of the tiny model on all rows, from the same seed each time, and note what happens."""
    model, rows = harness.model(), harness.encoded(trainer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in trained_names(model)
    if probe is not None:
        model.register_parameter("probe", probe)
    planned = trainer.planned_steps(len(rows))
    fitted = Fitted(model=model, planned=planned, before=copies(dict(model.named_parameters())))

    def after_step(given: nn.Module, step: int) -> None:
        fitted.steps.append(step)
        fitted.slots.append(copies(trained_parameters(given)))
        fitted.grads.append(
            copies({name: value.grad for name, value in trained_parameters(given).items() if value.grad is not None})
        )

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        fitted.seen.extend(inputs[0].tolist())

    hook = model.get_input_embeddings().register_forward_hook(look)
    seed_everything(0)
    with run_log() as run:
        fitted.result = trainer.fit(
            model,
            harness.codec().tokenizer,
            rows,
            after_step=after_step,
            extra_loss=extra_loss,
            validate=None,
            run=run,
            context=harness.context(steps=planned, directory=run.directory),
        )
        fitted.logged = files.history(run.directory)
    hook.remove()
    return fitted


def trained_names(model: nn.Module) -> set[str]:
    """The parameters of the last layer, and what a check added."""
    return {name for name, _ in model.named_parameters() if ".1." in name or name == "probe"}
