"""The runs of a comparison, before they are made: their rows, their steps, and what is in their places already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from tunekit.core.comparison import arms
from tunekit.core.comparison.arm_runs import run_directory
from tunekit.core.comparison.arms import Method
from tunekit.core.comparison.budget import Steps, Tokens
from tunekit.core.data import dataset
from tunekit.core.model import fingerprint
from tunekit.core.model.base import Base, context_length
from tunekit.core.pipeline import Pipeline
from tunekit.core.run import files
from tunekit.core.run.facts import recipe_changes, same_by_hash
from tunekit.errors import ConfigError, TunekitError


@attrs.frozen(kw_only=True)
class Trial:
    """One run of a comparison, before it is made.

    Args:
        method: of which arm it is.
        pipeline: whole, with seed and budget.
        steps: optimizer steps it takes.
        directory: where it goes.
        data: its rows; None where they cannot be read for this method, at which the run will fail.
    """

    method: Method
    pipeline: Pipeline
    steps: int
    directory: Path
    data: dataset.Data | None

    def check_same(self, base: Mapping[str, Any]) -> None:
        """Raise ConfigError if its directory holds the run of another pipeline, with other rows or another base."""
        if not (self.directory / files.RECIPE).is_file():
            files.check_free(self.directory)
            return
        where, started = str(self.directory), {}
        if (self.directory / files.START).is_file():
            started = files.read_json(self.directory / files.START)
        named = same_by_hash(started, base, self.data.fingerprint if self.data else None)
        if changed := recipe_changes(self.directory, self.pipeline.to_dict(), named):
            raise ConfigError(
                f"{where} holds the run of another pipeline; changed: {'; '.join(changed)}. Delete it, or choose "
                "another directory",
                "compare.directory",
            )
        if started:
            fingerprint.check_same(started["base"], base, f"the run in {where}")
            if self.data is not None and started["data"] != self.data.fingerprint:
                raise ConfigError(f"{where} holds a run with other rows than these", "compare.directory")


def measured_alike(trial: Trial, others: Sequence[Trial]) -> tuple[Path, ...]:
    """The run directories of other trials that have measured the same base on the same rows; maybe in another dtype."""
    return tuple(
        other.directory
        for other in others
        if other is not trial
        and (other.pipeline.seed, other.method.quantizer) == (trial.pipeline.seed, trial.method.quantizer)
        and (other.directory / files.START).is_file()
    )


def rows_of(methods: Sequence[Method], seed: int) -> list[dataset.Data | None]:
    """The rows of each with one seed, None for a method that cannot take them; the error, if every one cannot."""
    pipelines = [attrs.evolve(method.pipeline, seed=seed) for method in methods]
    first = pipelines[0]
    base = Base(
        model=first.model,
        revision=first.revision,
        trust_remote_code=first.trust_remote_code,
        added_tokens=first.added_tokens,
    )
    base.check()
    codec, longest = base.codec(first.template), context_length(base.config())
    read: dict[int, dataset.Data] = {}
    found: list[dataset.Data | None] = []
    failure: TunekitError | None = None
    for pipeline in pipelines:
        try:
            pipeline.check()
            taken = pipeline.adapter.extra_tokens()
            if taken not in read:
                parts = (pipeline.data, pipeline.validation, pipeline.trainer)
                read[taken] = dataset.load(*parts, codec, longest, pipeline.seed, pipeline.adapter)
            found.append(read[taken])
        except TunekitError as error:
            failure = error
            found.append(None)
    if failure and not any(found):
        raise failure
    return found


def trials_of(
    methods: Sequence[Method],
    seed: int,
    data: Sequence[dataset.Data | None],
    budgets: Mapping[str, Steps | Tokens | None],
    directory: Path,
) -> list[Trial]:
    """The runs with one seed. ConfigError if they would not have the same rows.

    Args:
        methods: one run each.
        seed: of all of them.
        data: what `rows_of` returned for them.
        budgets: by name of the method.
        directory: of the comparison.
    """
    seeded = [attrs.evolve(method.pipeline, seed=seed) for method in methods]
    reference = next(found for found in data if found is not None)
    if any(found is not None and found.fingerprint != reference.fingerprint for found in data):
        raise ConfigError(
            "some rows are too long for the methods that take a part of the model's context for virtual tokens, so "
            "that not all would see the same rows; set the trainer's max_length to what all have room for",
            "compare.adapters",
        )
    trials = []
    for method, pipeline, found in zip(methods, seeded, data, strict=True):
        if budget := budgets[method.name]:
            steps = budget.steps(pipeline.trainer, reference.train.lengths, seed)
            pipeline = attrs.evolve(pipeline, trainer=arms.with_fields(pipeline.trainer, max_steps=steps))
        trials.append(
            Trial(
                method=method,
                pipeline=pipeline,
                steps=pipeline.trainer.planned_steps(len(reference.train)),
                directory=run_directory(directory, method.name, seed),
                data=found,
            )
        )
    return trials
