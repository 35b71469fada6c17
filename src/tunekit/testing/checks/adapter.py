"""Checks of adapter methods in training: what is trained, what is left alone, and that it learns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from tunekit.core.evaluation.predicting import evaluating
from tunekit.core.interfaces import AdapterMethod
from tunekit.core.model import masters
from tunekit.core.run.checkpoint import trained_parameters
from tunekit.errors import NotSupported
from tunekit.testing.checks.component import unchanged
from tunekit.testing.harness import STEPS, Harness, attached
from tunekit.testing.training import (
    changed,
    copies,
    cross_entropy,
    differing,
    distance,
    frozen,
    gradients,
    logits,
    new_optimizer,
    train,
)

if TYPE_CHECKING:
    from torch import Tensor, nn


def starts_as_the_base(adapter: AdapterMethod, harness: Harness) -> None:
    """Before the first step the model predicts what its base does; or it says that it does not, and so it is."""
    batch = harness.batch()
    before = logits(harness.model(), batch)
    away = distance(logits(attached(adapter, harness), batch), before)
    if not adapter.starts_as_base:
        assert away > 1e-5, "untrained, it predicts what its base does: leave starts_as_base at True"
        return
    assert away <= 1e-5, (
        f"untrained, it moves the logits by {away:.2g}: start from zero (LoRA's B is zero), or set "
        "starts_as_base = False if the method changes the base on purpose"
    )


def starts_as_the_base_in_bfloat16(adapter: AdapterMethod, harness: Harness) -> None:
    """Over a bfloat16 base it starts as this base, too, to the last bit; or it says that it does not."""
    if not adapter.starts_as_base:
        return
    over = attrs.evolve(harness, dtype="bfloat16")
    batch = over.batch()
    away = distance(logits(attached(adapter, over), batch), logits(over.model(), batch))
    assert away == 0, (
        f"untrained, it moves the logits of a bfloat16 base by {away:.2g}: compute in float32 what it takes from the "
        "base's weights (their lengths, say), and round once, to the dtype of the activations"
    )


def base_is_frozen(adapter: AdapterMethod, harness: Harness) -> None:
    """After 3 steps every parameter that is not trained is bit for bit what it was, from before `attach` on."""
    base = harness.model()
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in base.named_parameters()}
    model = adapter.attach(base, harness.context())
    assert trained_parameters(model), "nothing is trainable: set requires_grad on what is to be trained in `attach`"
    added = {id(parameter) for parameter in model.parameters()} - {id(parameter) for parameter, _ in before.values()}
    assert not added or any(not parameter.requires_grad for parameter, _ in before.values()), (
        "it adds parameters and leaves all of the base trainable: call model.requires_grad_(False) first in `attach`"
    )
    at_start = copies(frozen(model))
    train(adapter, model, harness.batch(), 3)
    moved = changed(at_start, frozen(model))
    moved += [
        name for name, (now, then) in before.items() if not now.requires_grad and changed({name: then}, {name: now})
    ]
    assert not moved, f"these are not trainable and changed all the same: {moved[:3]}; never write into base weights"


def attaches_to_an_empty_model(adapter: AdapterMethod, harness: Harness) -> None:
    """It attaches to a model on the meta device, where `Pipeline.plan` counts the parameters without loading them."""
    import torch

    real = trained_parameters(attached(adapter, harness))
    with torch.device("meta"):
        empty = harness.model()
    planned = trained_parameters(adapter.attach(empty, harness.context()))
    counts = [{name: parameter.numel() for name, parameter in found.items()} for found in (real, planned)]
    assert counts[0] == counts[1], (
        "attached to a model on the meta device it trains other parameters than on a real one: decide by names and "
        "shapes, not by the values of weights"
    )


def gradients_arrive(adapter: AdapterMethod, harness: Harness) -> None:
    """Within 4 steps every trainable tensor has had a gradient that is not zero."""
    model = attached(adapter, harness)
    waiting = set(trained_parameters(model))

    def look() -> None:
        for name, parameter in trained_parameters(model).items():
            if parameter.grad is not None and parameter.grad.any():
                waiting.discard(name)

    train(adapter, model, harness.batch(), 4, after_backward=look)
    assert not waiting, (
        f"no gradient arrives at {sorted(waiting)[:3]}: use them in the forward pass without detach(), .data or "
        "no_grad(), do not start both factors of a product at zero, or freeze them"
    )


def extra_loss_is_a_scalar(adapter: AdapterMethod, harness: Harness) -> None:
    """The extra loss is None, or a scalar with a gradient."""
    extra = adapter.extra_loss(attached(adapter, harness))
    assert extra is None or (extra.dim() == 0 and extra.requires_grad), (
        f"extra_loss returned {extra!r}: return None, or a tensor of no dimensions that depends on trained parameters"
    )


def evaluation_keeps_gradients(adapter: AdapterMethod, harness: Harness) -> None:
    """The gradients are the same with and without an evaluation in between."""
    model, batch = attached(adapter, harness), harness.batch()
    train(adapter, model, batch, 2)
    before = gradients(model, batch)
    logits(model, batch)
    other = differing(before, gradients(model, batch))
    assert not other, (
        f"an evaluation changes the gradients of {other[:3]} afterwards: keep no state between forward passes"
    )


def checkpointing_keeps_gradients(adapter: AdapterMethod, harness: Harness) -> None:
    """The gradients are the same when activations are not kept but computed again; or it is NotSupported."""
    from transformers import PreTrainedModel

    model, batch = attached(adapter, harness), harness.batch()
    train(adapter, model, batch, 1)
    before = gradients(model, batch)
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    # The name it has in newer transformers.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable()
    try:
        other = differing(before, gradients(model, batch))
    except NotSupported:
        return
    assert not other, (
        f"with gradient checkpointing the gradients of {other[:3]} are others: a layer is then computed twice, and "
        "must give the same both times"
    )


def trains_in_bfloat16(adapter: AdapterMethod, harness: Harness) -> None:
    """Over a bfloat16 base it trains and predicts in bfloat16, in float32 what it trains; the rest stays to the bit."""
    import torch

    over = attrs.evolve(harness, dtype="bfloat16")
    base, batch = over.model(), over.batch()
    own = {id(parameter) for parameter in base.parameters()}
    model = adapter.attach(base, over.context())
    coarse = [
        name
        for name, parameter in trained_parameters(model).items()
        if id(parameter) not in own and parameter.dtype != torch.float32
    ]
    assert not coarse, f"over a bfloat16 base it adds {coarse[:3]} in less than float32: small updates are rounded away"
    masters.train_in_float32(model)  # as a run does, with weights of the base
    coarse = [name for name, parameter in trained_parameters(model).items() if parameter.dtype != torch.float32]
    assert not coarse, f"over a bfloat16 base {coarse[:3]} cannot be trained in float32: train plain floating numbers"
    at_start = copies(frozen(model))
    try:
        train(adapter, model, batch, 2)
        found = logits(model, batch)
    except RuntimeError as error:
        raise AssertionError(
            f"over a bfloat16 base it fails ({error}): return activations in the dtype of those it is given"
        ) from error
    moved = changed(at_start, frozen(model))
    assert not moved, f"over a bfloat16 base {moved[:3]} are not trainable and changed: never write into base weights"
    assert found.dtype == torch.bfloat16, f"over a bfloat16 base its logits are {found.dtype}: return the base's dtype"
    assert found.isfinite().all(), "over a bfloat16 base its logits are not finite after two steps"


def learns(adapter: AdapterMethod, harness: Harness) -> None:
    """The loss on a batch falls when it is trained on this batch."""
    model, batch = attached(adapter, harness), harness.batch()
    before = _loss(model, batch)
    train(adapter, model, batch, STEPS)
    after = _loss(model, batch)
    assert after < before * 0.999, (
        f"{STEPS} steps on one batch take its loss from {before:.4f} to {after:.4f}: the parameters it trains have too "
        "little effect on the output, or the wrong sign"
    )


def is_deterministic(adapter: AdapterMethod, harness: Harness) -> None:
    """The same seed gives the same losses."""
    batch = harness.batch()
    runs = []
    for _ in range(2):
        model = attached(adapter, harness)
        runs.append(train(adapter, model, batch, 3))
    assert runs[0] == runs[1], (
        f"the same seed gave the losses {runs[0]} and {runs[1]}: draw from torch's global generator, not from a new "
        "one or from the clock, and iterate over lists, not sets"
    )


def takes_every_step(adapter: AdapterMethod, harness: Harness) -> None:
    """`after_step` takes every step from 1 to the planned one, and leaves the frozen weights alone."""
    model = attached(adapter, harness)
    cross_entropy(model.train(), harness.batch()).backward()
    before = copies(frozen(model))
    for step in range(1, STEPS + 1):
        try:
            adapter.after_step(model, step)
        except Exception as error:
            raise AssertionError(
                f"after_step({step}) of {STEPS} raised {type(error).__name__}: {error}; take steps from 1 to "
                "context.total_steps, while gradients are present"
            ) from error
        moved = changed(before, frozen(model))
        assert not moved, f"after_step({step}) changed the frozen {moved[:3]}: change only what is trained"


def is_stateless(adapter: AdapterMethod, harness: Harness) -> None:
    """Used for several models, it stays as it was, and each of them learns as if it were alone."""
    import torch

    batch = harness.batch()

    def losses(*models: nn.Module) -> list[list[float]]:
        optimizers = [new_optimizer(model) for model in models]
        found: list[list[float]] = [[] for _ in models]
        for step in (1, 2, 3):
            for at, model in enumerate(models):
                torch.manual_seed(step)
                found[at] += train(adapter, model, batch, 1, first=step, optimizer=optimizers[at])
        return found

    with unchanged(adapter):
        (alone,) = losses(attached(adapter, harness))
        together = losses(attached(adapter, harness), attached(adapter, harness))
    assert together == [alone, alone], (
        f"two models trained in turn have the losses {together}, one alone {alone}: keep what belongs to a model in it"
    )


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> float:
    with evaluating(model):
        return float(cross_entropy(model, batch))


CHECKS = (
    starts_as_the_base,
    starts_as_the_base_in_bfloat16,
    base_is_frozen,
    attaches_to_an_empty_model,
    gradients_arrive,
    extra_loss_is_a_scalar,
    evaluation_keeps_gradients,
    checkpointing_keeps_gradients,
    trains_in_bfloat16,
    learns,
    is_deterministic,
    takes_every_step,
    is_stateless,
)
