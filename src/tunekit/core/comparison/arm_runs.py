"""What came of an arm of a comparison: of each of its runs, and over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from tunekit.core.common.intervals import half_width

NOT_YET = "not run yet"
"""The error of a run that was not made: the comparison goes on, or was stopped."""
Direction = Literal["min", "max"]
COSTS: Mapping[str, Direction] = {
    "trainable_parameters": "min",
    "peak_memory": "min",
    "tokens_per_second": "max",
    "adapter_bytes": "min",
    "seconds": "min",
    "training_seconds": "min",
}
"""What is compared besides quality, and which direction is better."""


@attrs.frozen(kw_only=True)
class ArmRun:
    """One run of an arm: a method, trained with one seed.

    Args:
        seed: of the run.
        steps: optimizer steps it was trained for.
        error: why it failed, with the name of the exception; None if it finished. What follows is then empty.
        metrics: of the tuned model.
        base_metrics: of its base, by the same code on the same rows.
        prompted_metrics: by the name of each baseline of the pipeline ("prompted-4"), those of its base so prompted.
        trainable_parameters: parameters that training changes.
        peak_memory: bytes; None on the CPU, where they cannot be told apart from those of the process.
        tokens_per_second: of training rows, while training; None where it was not measured.
        adapter_bytes: size on disk of the adapter directory.
        seconds: the whole run with its evaluations, and the first time in a process the import of libraries; None if it
            was resumed.
        training_seconds: of them those of training, without loading, evaluations, checkpoints and what the first step
            takes longer; None where that was not measured, and if it was resumed.
    """

    seed: int
    steps: int
    error: str | None = None
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    base_metrics: Mapping[str, float] = attrs.field(factory=dict)
    prompted_metrics: Mapping[str, Mapping[str, float]] = attrs.field(factory=dict)
    trainable_parameters: int | None = None
    peak_memory: int | None = None
    tokens_per_second: float | None = None
    adapter_bytes: int | None = None
    seconds: float | None = None
    training_seconds: float | None = None


@attrs.frozen(kw_only=True)
class Arm:
    """One line of a comparison: a method with a learning rate.

    Args:
        name: also that of its directory.
        adapter: the method, as in a recipe.
        quantization: the scheme its base is stored in; None for a plain base.
        learning_rate: the highest; None if the trainer does not say.
        runs: one a seed.
    """

    name: str
    adapter: Mapping[str, Any]
    quantization: str | None
    learning_rate: float | None
    runs: tuple[ArmRun, ...]

    @property
    def finished(self) -> bool:
        """Whether every run of it finished."""
        return all(run.error is None for run in self.runs)

    @property
    def baselines(self) -> list[str]:
        """The longer prompts with which its base was measured ("prompted-4")."""
        return list(dict.fromkeys(name for run in self.runs for name in run.prompted_metrics))

    def mean(self, name: str, baseline: str | None = None) -> tuple[float | None, float | None]:
        """Mean over the finished runs, and half of its 95 % interval, of a metric, of `base_` and a metric, or a cost.

        With a `baseline`, one of `baselines`, a metric is that of the base so prompted.

        None where there is no such figure, and None for the interval where there are not two runs.
        """
        values = [value for run in self.runs if (value := _figure(run, name, baseline)) is not None]
        if not values:
            return None, None
        # What is the same in every run, such as a count, stays as it is.
        return values[0] if len(set(values)) == 1 else statistics.fmean(values), half_width(values)


def run_directory(directory: Path, arm: str, seed: int) -> Path:
    """Where the run of an arm is."""
    return directory / arm / f"seed-{seed}"


def _figure(run: ArmRun, name: str, baseline: str | None) -> float | None:
    if baseline is not None:
        return run.prompted_metrics.get(baseline, {}).get(name)
    if name in COSTS:
        found: float | None = getattr(run, name)
        return found
    return run.base_metrics.get(name.removeprefix("base_")) if name.startswith("base_") else run.metrics.get(name)
