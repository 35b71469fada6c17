"""`compare`: the same fine-tune by several methods, each an ordinary run, and what came of them side by side."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from tunekit.core import recipe
from tunekit.core.common.secrets import redacted
from tunekit.core.comparison import arms, probes
from tunekit.core.comparison.arm_runs import COSTS, NOT_YET, Arm, ArmRun, run_directory
from tunekit.core.comparison.arms import Method
from tunekit.core.comparison.budget import Budget, Minutes, Steps, Tokens
from tunekit.core.comparison.comparison import Comparison
from tunekit.core.comparison.shared_base import SharedBase
from tunekit.core.comparison.trials import Trial, measured_alike, rows_of, trials_of
from tunekit.core.component import Context
from tunekit.core.interfaces import AdapterMethod
from tunekit.core.model import devices, fingerprint
from tunekit.core.model.base import Base, LoadBase
from tunekit.core.pipeline import Pipeline
from tunekit.core.registry import default_registry
from tunekit.core.remote.job import Job
from tunekit.core.remote.ray import Ray
from tunekit.core.run import files
from tunekit.core.run.gauge import measured
from tunekit.core.run.measuring import check_names
from tunekit.core.training.parallel import check_alone
from tunekit.errors import ConfigError

logger = logging.getLogger(__name__)


def compare(
    pipeline: Pipeline,
    adapters: Sequence[AdapterMethod] | None = None,
    *,
    directory: str | Path,
    budget: Budget | None = None,
    seeds: Sequence[int] = (0,),
    learning_rates: Sequence[float] | None = None,
    observers: Iterable[object] = (),
    on: Ray | None = None,
) -> Comparison:
    """Fine-tune by several methods on the same rows in the same order from the same base, and compare what came of it.

    Each run is an ordinary one in `directory/<arm>/seed-<n>`, to the last bit what `Pipeline.run` makes of it alone.
    The base stays in memory from one to the next, put back as it was loaded; it is loaded again where a method wrote
    into its weights. Baselines (`tunekit.Prompted`) are measured once for each base and seed, but on a cluster, and are
    lines of their own. Called again, it takes finished runs as they are and goes on with unfinished ones. A run that
    fails does not stop the others; it is tried again by the next call.

    Args:
        pipeline: all but the method, the seed and the learning rate.
        adapters: the methods; None takes the pipeline's own, which makes sense with several learning rates or seeds.
        directory: of the comparison.
        budget: `tunekit.Steps`, `tunekit.Tokens` or `tunekit.Minutes`, the same for all; None leaves it to the trainer.
        seeds: each arm is run with each. A seed chooses the initial adapter, the order of rows, dropout, and where the
            validation is a share, the held-out rows.
        learning_rates: each is tried with each method, as an arm of its own; None takes each method's own, whatever the
            trainer's is.
        observers: as for `Pipeline.run`, told of every run.
        on: a cluster that makes the runs, as many at once as it has room for; None makes them here, one by one.

    Raises:
        ConfigError, DataError: before anything is trained: what is wrong with the arguments or the data; a directory
            that holds runs of another pipeline, base or other rows; methods that would not see the same rows.
    """
    directory, seeds, observers = Path(directory), tuple(seeds), tuple(observers)
    check_alone("a comparison")
    _check_arguments(budget, seeds, learning_rates, on)
    check_names(pipeline.evaluators)
    methods = arms.methods(pipeline, (pipeline.adapter,) if adapters is None else tuple(adapters), learning_rates)
    names = [method.name for method in methods]
    device, shared = "cpu" if on else devices.choose(pipeline.device), SharedBase()
    errors: dict[Path, str] = {}
    rows = {seed: rows_of(methods, seed) for seed in seeds}

    def planned(budgets: Mapping[str, Steps | Tokens | None]) -> list[Trial]:
        return [trial for seed in seeds for trial in trials_of(methods, seed, rows[seed], budgets, directory)]

    def settle() -> bool:
        unchanged = shared.take_back()
        _free_memory(device)
        return unchanged

    budgets: Mapping[str, Steps | Tokens | None]
    if isinstance(budget, Minutes):
        # For what is wrong with all: before anything is written. The steps are known after the probes.
        planned(dict.fromkeys(names, Tokens(1)))
        directory.mkdir(parents=True, exist_ok=True)
        found, failed = probes.budgets(methods, budget, seeds[0], directory, shared.load, settle)
        budgets = {name: found.get(name, Tokens(1)) for name in names}
        errors |= {run_directory(directory, name, seed): why for name, why in failed.items() for seed in seeds}
    else:
        budgets = dict.fromkeys(names, budget)
    trials = planned(budgets)
    base = Base(model=pipeline.model, revision=pipeline.revision, trust_remote_code=pipeline.trust_remote_code)
    known = fingerprint.fingerprint(base)
    for trial in trials:
        trial.check_same(known)

    def so_far() -> Comparison:
        return Comparison(
            directory=directory,
            budget=str(budget or f"{trials[0].steps:,} steps"),
            seeds=seeds,
            better={name: way for evaluator in pipeline.evaluators for name, way in evaluator.better.items()},
            arms=tuple(_arm(method, trials, errors) for method in methods),
        )

    directory.mkdir(parents=True, exist_ok=True)
    todo = [one for one in trials if not (one.directory / files.RESULT).is_file() and one.directory not in errors]
    if on:
        with closing(on.make_all([_job(trial, observers) for trial in todo])) as made:
            for at, error in made:
                if error:
                    errors[todo[at].directory] = redacted(f"{type(error).__name__}: {error}")
                so_far().save()
        todo = []
    # By how their base is stored, so that each is loaded once and none is in memory with another.
    for trial in sorted(todo, key=lambda trial: trial.method.stored):
        logger.info("%s, seed %d", trial.method.name, trial.pipeline.seed)
        try:
            _run(trial, observers, shared.load, measured_alike(trial, trials))
        except Exception as error:  # one method's failure is a result of the comparison, not its end
            errors[trial.directory] = redacted(f"{type(error).__name__}: {error}")
        if not settle():
            logger.info("%s changed the base, which is loaded again", trial.method.name)
        so_far().save()
    (comparison := so_far()).save()
    return comparison


def _check_arguments(
    budget: Budget | None, seeds: Sequence[int], learning_rates: Sequence[float] | None, on: Ray | None
) -> None:
    if not isinstance(budget, Steps | Tokens | Minutes | None):
        raise ConfigError(
            f"expected tk.Steps(n), tk.Tokens(n), tk.Minutes(n) or None, got {budget!r}", "compare.budget"
        )
    if on and isinstance(budget, Minutes):
        raise ConfigError("how fast a cluster trains is not known here; use tk.Tokens", "compare.budget")
    for name, values in (("seeds", seeds), ("learning_rates", learning_rates)):
        if values is not None and (not values or len(set(values)) < len(values)):
            raise ConfigError(f"must be different numbers, at least one, got {values!r}", f"compare.{name}")


def _job(trial: Trial, observers: Sequence[object]) -> Job:
    """The run to be made, or to be gone on with."""
    resume = (trial.directory / files.RECIPE).is_file()
    return Job(pipeline=trial.pipeline, directory=trial.directory, resume=resume, observers=tuple(observers))


def _run(trial: Trial, observers: Sequence[object], load: LoadBase, alike: Sequence[Path]) -> None:
    """Make the run here. The finished run, and its model with it, is not kept."""
    job = _job(trial, observers)
    job.pipeline._run(job.directory, job.resume, job.observers, load, alike)


def _free_memory(device: str) -> None:
    """Give back what the last run held, so that the next has as much room and its peak is its own."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def _arm(method: Method, trials: Sequence[Trial], errors: Mapping[Path, str]) -> Arm:
    pipeline = method.pipeline
    context = Context(model_id=pipeline.model, learning_rate=pipeline.adapter.learning_rate)
    return Arm(
        name=method.name,
        adapter=recipe.to_table(pipeline.adapter, default_registry()),
        quantization=method.quantization,
        learning_rate=pipeline.trainer.peak_learning_rate(context),
        runs=tuple(_figures(trial, errors) for trial in trials if trial.method is method),
    )


def _figures(trial: Trial, errors: Mapping[Path, str]) -> ArmRun:
    """What is known of a run, from its directory."""
    seed = trial.pipeline.seed
    if not (trial.directory / files.RESULT).is_file():
        return ArmRun(seed=seed, steps=trial.steps, error=errors.get(trial.directory, NOT_YET))
    result = files.read_json(trial.directory / files.RESULT)
    return ArmRun(
        seed=seed,
        steps=result["training"]["steps"],
        metrics=result["metrics"],
        base_metrics=result["base_metrics"],
        prompted_metrics=result.get("prompted", {}),
        trainable_parameters=result["parameters"]["trainable"],
        adapter_bytes=_size(trial.directory / files.ADAPTER),
        **{name: value for name, value in measured(trial.directory).items() if name in COSTS},
    )


def _size(directory: Path) -> int:
    """Bytes of all files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
