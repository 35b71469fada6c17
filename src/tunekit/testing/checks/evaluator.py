"""Checks of evaluators: honest numbers, in the direction they claim, from a model that is left as it was found."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from operator import mul
from typing import TYPE_CHECKING
from unittest import SkipTest

from tunekit.core.common.random_states import random_states
from tunekit.core.interfaces import Encoded, Evaluator
from tunekit.core.outcomes import Measured
from tunekit.testing.checks.component import unchanged
from tunekit.testing.harness import Harness
from tunekit.testing.training import changed, copies, cross_entropy

if TYPE_CHECKING:
    from torch import nn

LEARNT = 45
"""Steps after which the tiny model knows the harness's rows by heart."""


def returns_what_it_declares(evaluator: Evaluator, harness: Harness) -> None:
    """One finite number for each name in `better`."""
    better = dict(evaluator.better)
    assert set(better.values()) <= {"min", "max"}, (
        f"`better` is {better!r}: give each metric and its better direction, {{'score': 'max'}}"
    )
    found = _evaluate(evaluator, harness.model(), harness)
    assert found.keys() == better.keys(), f"it returned {sorted(found)}, and `better` declares {sorted(better)}"
    for name, value in found.items():
        assert type(value) in (int, float), f"{name} is {value!r}: return a Python number (.item() of a tensor)"
        assert math.isfinite(value), f"{name} is {value}: return a finite number, a large one where there is no answer"
    assert better or (isinstance(found, Measured) and found.details), "it says nothing: return metrics or details"


def keeps_what_it_says(evaluator: Evaluator, harness: Harness) -> None:
    """Scores of rows have the metric as their mean, and details can be written as JSON."""
    found = _evaluate(evaluator, harness.model(), harness)
    if not isinstance(found, Measured):
        raise SkipTest("it returns metrics alone")
    try:
        json.dumps([found.details, found.scores, found.weights], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AssertionError(
            f"its details cannot be written: {error}; return finite numbers, texts and lists"
        ) from None
    for name, scores in found.scores.items():
        assert name in evaluator.better, f"it has scores of {name}, which is no metric of `better`"
        weights = found.weights.get(name, [1] * len(scores))
        mean = sum(map(mul, scores, weights)) / sum(weights)
        assert math.isclose(mean, found[name], rel_tol=1e-6, abs_tol=1e-9), (
            f"{name} is {found[name]}, and the mean of its scores {mean}: give scores to means over rows alone"
        )


def leaves_the_model_alone(evaluator: Evaluator, harness: Harness) -> None:
    """Mode, parameters, gradients and random states are as they were."""
    import torch

    model = harness.model().train()
    frozen_part = next(iter(model.children()))
    frozen_part.eval()
    for parameter in frozen_part.parameters():
        parameter.requires_grad = False
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    modes = [module.training for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    values, grads = copies(dict(model.named_parameters())), copies(_grads(model))
    states = _random_states()

    _evaluate(evaluator, model, harness)

    advice = "put the work inside `with tunekit.core.evaluation.predicting.evaluating(model)`"
    assert [module.training for module in model.modules()] == modes, (
        f"it left modules in another mode (training or evaluation) than before: {advice}"
    )
    assert [parameter.requires_grad for parameter in model.parameters()] == trained, (
        f"it changed requires_grad: {advice}"
    )
    assert not changed(values, dict(model.named_parameters())), "it changed parameters: an evaluator only looks"
    assert not changed(grads, _grads(model)), f"it left other gradients than before: {advice}"
    assert _random_states() == states, (
        "it moved a random state, and training would go on otherwise than without it: draw from a generator of its own"
    )


def repeats_itself(evaluator: Evaluator, harness: Harness) -> None:
    """The same model and rows give the same numbers."""
    model = harness.model()
    first, second = (_evaluate(evaluator, model, harness) for _ in range(2))
    assert first == second, f"it returned {first}, and then {second}: fix the seed of what it draws"


def does_not_mind_the_order(evaluator: Evaluator, harness: Harness) -> None:
    """Rows in another order give the same numbers."""
    model, rows = _learnt(harness), harness.encoded()
    given, turned = (_evaluate(evaluator, model, harness, some) for some in (rows, rows[::-1]))
    for name, value in given.items():
        assert math.isclose(value, turned[name], rel_tol=1e-4, abs_tol=1e-6), (
            f"{name} is {value} for the rows in order and {turned[name]} in reverse: weigh every token, or every row, "
            "alike, and not every batch; mask the padding"
        )


def points_the_right_way(evaluator: Evaluator, harness: Harness) -> None:
    """A model that knows the rows by heart scores better than one that never saw them."""
    untrained = _evaluate(evaluator, harness.model(), harness)
    trained = _evaluate(evaluator, _learnt(harness), harness)
    for name, direction in evaluator.better.items():
        gain = trained[name] - untrained[name]
        assert (gain if direction == "max" else -gain) > 0, (
            f"{name} goes from {untrained[name]:.4g} (untrained) to {trained[name]:.4g} (rows known by heart), and "
            f"`better` says {direction!r}: turn the direction, or compare with the labels (logits at t predict t + 1)"
        )


def is_stateless(evaluator: Evaluator, harness: Harness) -> None:
    """Evaluating leaves it as it was."""
    with unchanged(evaluator):
        _evaluate(evaluator, harness.model(), harness)


def _evaluate(
    evaluator: Evaluator, model: nn.Module, harness: Harness, rows: list[Encoded] | None = None
) -> Mapping[str, float]:
    rows = harness.encoded() if rows is None else rows
    return evaluator.evaluate(model, harness.codec().tokenizer, rows, harness.context())


def _learnt(harness: Harness) -> nn.Module:
    return _learnt_from(harness.architecture, json.dumps(harness.rows))


@cache
def _learnt_from(architecture: str, rows: str) -> nn.Module:
    """The tiny model, all of it trained on these rows; evaluators leave it as it is, so one serves them all."""
    import torch

    harness = Harness(architecture=architecture, rows=tuple(json.loads(rows)))
    model = harness.model()
    batch = harness.batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(LEARNT):
        cross_entropy(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def _grads(model: nn.Module) -> dict[str, object]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _random_states() -> str:
    return repr(
        {name: getattr(state, "tolist", lambda state=state: state)() for name, state in random_states().items()}
    )


CHECKS = (
    returns_what_it_declares,
    keeps_what_it_says,
    leaves_the_model_alone,
    repeats_itself,
    does_not_mind_the_order,
    points_the_right_way,
    is_stateless,
)
