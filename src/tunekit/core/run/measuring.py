"""Measuring a model with all evaluators of a run, and keeping what stands behind the metrics in the run directory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.component import Context
from tunekit.core.evaluation.answers import Asked
from tunekit.core.evaluation.predicting import evaluating
from tunekit.core.evaluation.prompted import Baseline
from tunekit.core.evaluation.statistics import LEVEL, RESAMPLES, mean_interval, paired_difference
from tunekit.core.interfaces import Encoded, Evaluator
from tunekit.core.outcomes import Measured
from tunekit.core.run.files import EVALUATIONS, START, dtype_of, read_json, write_json
from tunekit.core.training import sharded
from tunekit.core.training.parallel import ALONE, Processes
from tunekit.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

BASE, TUNED = "base", "tuned"


def check_names(evaluators: Iterable[Evaluator]) -> None:
    """Raise ConfigError if two evaluators return a metric of the same name."""
    names = [name for evaluator in evaluators for name in evaluator.better]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(f"two evaluators return {sorted(twice)[0]!r}", "Pipeline.evaluators")


def check_rows(
    evaluators: Iterable[Evaluator], tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded], context: Context
) -> None:
    """Raise DataError if an evaluator cannot measure the held-out rows, where there are any."""
    for evaluator in evaluators if rows else ():
        evaluator.check_data(tokenizer, rows, context)


def measure(
    evaluators: Iterable[Evaluator],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    context: Context,
) -> Measured:
    """All metrics of all evaluators on `rows`; none without rows. TrainingError for one that is not finite.

    The details of each evaluator are under its name, those of a second one of its name under "name-2".
    """
    metrics: dict[str, float] = {}
    scores: dict[str, Sequence[float]] = {}
    weights: dict[str, Sequence[float]] = {}
    details: dict[str, Any] = {}
    if rows:
        asked = Asked(rows)
        with evaluating(model):
            for evaluator in evaluators:
                found = evaluator.evaluate(model, tokenizer, asked, context)
                metrics |= found
                if isinstance(found, Measured):
                    scores |= found.scores
                    weights |= found.weights
                    details |= {_free(evaluator.name, details): found.details} if found.details else {}
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainingError(f"{name} on the validation rows is {value}: the model's output is broken")
    return Measured(metrics, scores=scores, weights=weights, details=details)


@attrs.define(eq=False)
class Measuring:
    """The evaluations of one run: of the base, while training, and of the tuned model.

    Each is written to `evaluations/base.json`, `evaluations/step-000040.json`, `evaluations/tuned.json`.

    Args:
        evaluators: what is measured.
        tokenizer: the model's.
        rows: the held-out rows; nothing is measured without.
        context: the facts of the run.
        processes: those of the run; the first measures, so that each row counts once, and the others wait, or go
            along where the model is in pieces.
        alike: the directories of runs that have measured the same base with the same baselines on the same rows; what
            one in this dtype has found is taken from there.
        step: optimizer steps taken.
    """

    evaluators: Sequence[Evaluator]
    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[Encoded]
    context: Context
    processes: Processes = ALONE
    alike: Sequence[Path] = ()
    step: int = 0

    def counting(self, after_step: Callable[[nn.Module, int], None]) -> Callable[[nn.Module, int], None]:
        """`after_step`, and the step is known here: an evaluation while training is kept under its number."""

        def counted(model: nn.Module, step: int) -> None:
            self.step = step
            after_step(model, step)

        return counted

    def measure(self, model: nn.Module, name: str | None = None) -> Mapping[str, float]:
        """The metrics of `model`; kept as `name`, else under the number of the step."""
        return self._found(model, lambda: dict(self._measure(model, name)))

    def measure_prompted(self, base: nn.Module, baselines: Iterable[Baseline]) -> dict[str, Mapping[str, float]]:
        """By the name of each baseline, the metrics of `base` on its rows; evaluators with rows of their own rest."""
        return {one.name: self._found(base, partial(self._measure_prompted, base, one)) for one in baselines}

    def _found(self, model: nn.Module, function: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What the first process measures; all of them go through a model that lies in pieces."""
        if sharded.in_pieces(model):
            return self.processes.together(function)[0]
        return self.processes.shared(function)

    def _measure(self, model: nn.Module, name: str | None) -> Measured:
        directory, context = self.context.run_directory, self.context
        if directory and name != BASE:
            context = attrs.evolve(context, base_metrics=read_json(directory / START)["base_metrics"])
        found = measure(self.evaluators, model, self.tokenizer, self.rows, context)
        self._keep(name or f"step-{self.step:06d}", found)
        return found

    def _measure_prompted(self, base: nn.Module, baseline: Baseline) -> dict[str, float]:
        other = next((place for place in self.alike if dtype_of(place) == self.context.dtype), None)
        if other and (directory := self.context.run_directory):
            known = read_json(other / EVALUATIONS / f"{baseline.name}.json")
            write_json(directory / EVALUATIONS / f"{baseline.name}.json", known)
            return dict(known["metrics"])
        able = [evaluator for evaluator in self.evaluators if evaluator.reads_rows]
        found = measure(able, base, self.tokenizer, baseline.rows, self.context)
        found.details["prompted"] = baseline.details
        self._keep(baseline.name, found)
        return dict(found)

    def _keep(self, name: str, found: Measured) -> None:
        if self.rows and (directory := self.context.run_directory) and self.processes.is_first:
            (directory / EVALUATIONS).mkdir(exist_ok=True)
            kept = {"metrics": found, "details": found.details, "scores": found.scores, "weights": found.weights}
            write_json(directory / EVALUATIONS / f"{name}.json", kept)

    def intervals(self) -> dict[str, Any]:
        """For each metric with a score a row: intervals of base, tuned and their difference, and `p` of that.

        Under `prompted` the same of each baseline: its interval, what the tuned model has more than it, and `p`.
        """
        if not self.rows or self.context.run_directory is None:
            return {}
        directory = self.context.run_directory / EVALUATIONS
        base, tuned = (read_json(directory / f"{name}.json") for name in (BASE, TUNED))
        prompted = read_json(self.context.run_directory / START).get("prompted", {})
        others = {name: read_json(directory / f"{name}.json")["scores"] for name in prompted}
        found: dict[str, Any] = {}
        for metric, scores in tuned["scores"].items():
            before, weights = base["scores"].get(metric, []), tuned["weights"].get(metric)
            if len(before) != len(scores):  # the run was resumed with other rows or evaluators, by force
                continue
            gain = paired_difference(before, scores, weights, seed=self.context.seed)
            found[metric] = {
                BASE: mean_interval(before, weights, seed=self.context.seed),
                TUNED: mean_interval(scores, weights, seed=self.context.seed),
                "difference": [gain.low, gain.high],
                "p": gain.p,
            }
            for name, by_metric in others.items():
                if len(shown := by_metric.get(metric, [])) == len(scores):
                    more = paired_difference(shown, scores, weights, seed=self.context.seed)
                    interval = mean_interval(shown, weights, seed=self.context.seed)
                    compared = {"interval": interval, "difference": [more.low, more.high], "p": more.p}
                    found[metric].setdefault("prompted", {})[name] = compared
        return {"level": LEVEL, "resamples": RESAMPLES, "seed": self.context.seed, "metrics": found} if found else {}


def _free(name: str, taken: Mapping[str, Any]) -> str:
    number = 1 + sum(key == name or key.startswith(f"{name}-") for key in taken)
    return name if number == 1 else f"{name}-{number}"
