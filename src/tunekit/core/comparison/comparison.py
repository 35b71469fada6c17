"""`Comparison`: methods side by side, as a table, as plain rows, as a plot, and as a file."""

from __future__ import annotations

import html
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from tunekit.core.common import plots
from tunekit.core.common.intervals import half_width
from tunekit.core.common.table import table
from tunekit.core.fields import did_you_mean
from tunekit.core.opening import open_run
from tunekit.core.run.files import read_json, write_json
from tunekit.core.run.result import Run
from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "comparison.json"
NOT_YET = "not run yet"
"""The error of a run that was not made: the comparison goes on, or was stopped."""
Direction = Literal["min", "max"]
COSTS: Mapping[str, Direction] = {
    "trainable_parameters": "min",
    "peak_memory": "min",
    "tokens_per_second": "max",
    "adapter_bytes": "min",
    "seconds": "min",
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
        trainable_parameters: parameters that training changes.
        peak_memory: bytes; None on the CPU, where they cannot be told apart from those of the process.
        tokens_per_second: of training rows, while training; None where it was not measured.
        adapter_bytes: size on disk of the adapter directory.
        seconds: the whole run with its evaluations, and the first time in a process the import of libraries; None if it
            was resumed.
    """

    seed: int
    steps: int
    error: str | None = None
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    base_metrics: Mapping[str, float] = attrs.field(factory=dict)
    trainable_parameters: int | None = None
    peak_memory: int | None = None
    tokens_per_second: float | None = None
    adapter_bytes: int | None = None
    seconds: float | None = None


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

    def mean(self, name: str) -> tuple[float | None, float | None]:
        """Mean over the finished runs, and half of its 95 % interval, of a metric, of `base_` and a metric, or a cost.

        None where there is no such figure, and None for the interval where there are not two runs.
        """
        values = [value for run in self.runs if (value := _figure(run, name)) is not None]
        if not values:
            return None, None
        # What is the same in every run, such as a count, stays as it is.
        return values[0] if len(set(values)) == 1 else statistics.fmean(values), half_width(values)


@attrs.frozen(kw_only=True)
class Comparison:
    """What `tunekit.compare` returns; prints as a table.

    Args:
        directory: it holds `comparison.json` and the run directories, `<arm>/seed-<n>`.
        budget: how long each run was trained.
        seeds: each arm was run with each.
        better: every metric, and which direction is better.
        arms: the methods, in the order given.
    """

    directory: Path
    budget: str
    seeds: tuple[int, ...]
    better: Mapping[str, Direction]
    arms: tuple[Arm, ...]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """An arm a row, of plain values: means over seeds; under `<metric>_interval` half of the 95 % interval."""
        return [self._row(arm) for arm in self.arms]

    @property
    def failures(self) -> list[str]:
        """Each run that failed, and why."""
        return [f"{arm.name}, seed {run.seed}: {run.error}" for arm, run in self._lacking() if run.error != NOT_YET]

    def best(self, metric: str) -> Arm:
        """The arm with the best mean of a metric, among those of which no run failed.

        Raises ConfigError for a metric that no evaluator returns, or if no arm has it.
        """
        self._check(metric, self.better)
        means = {arm.name: arm.mean(metric)[0] for arm in self.arms if arm.finished}
        known = {name: mean for name, mean in means.items() if mean is not None}
        if not known:
            raise ConfigError(f"no arm has {metric}: {'; '.join(self.failures) or 'no rows are held out'}")
        chosen = (min if self.better[metric] == "min" else max)(known, key=lambda name: known[name])
        return next(arm for arm in self.arms if arm.name == chosen)

    def run(self, arm: Arm | str, seed: int | None = None, *, trust_remote_code: bool = False) -> Run:
        """The run of an arm, to ask its model or to export it.

        Args:
            arm: what `best` returned, or its name.
            seed: one of `seeds`; None for the first.
            trust_remote_code: as for `tunekit.open_run`.
        """
        name = arm if isinstance(arm, str) else arm.name
        self._check(name, [arm.name for arm in self.arms])
        place = run_directory(self.directory, name, self.seeds[0] if seed is None else seed)
        return open_run(place, trust_remote_code=trust_remote_code)

    def plot(self, metric: str, cost: str = "trainable_parameters") -> Figure:
        """Quality against cost as a matplotlib figure, with the Pareto front, intervals, and the base as a line.

        Args:
            metric: one of `better`.
            cost: "trainable_parameters", "peak_memory", "tokens_per_second", "adapter_bytes" or "seconds".

        Raises ConfigError without matplotlib, and for a name that is neither.
        """
        self._check(metric, self.better)
        self._check(cost, COSTS)
        points = []
        for arm in self.arms:
            (quality, interval), (spent, _) = arm.mean(metric), arm.mean(cost)
            if quality is not None and spent is not None:
                points.append(plots.Point(arm.name, spent, quality, interval))
        bases = {arm.mean(f"base_{metric}")[0] for arm in self.arms} - {None}
        base = bases.pop() if len(bases) == 1 else None
        return plots.against(points, (cost, metric), (COSTS[cost], self.better[metric]), base)

    def save(self) -> None:
        """Write `comparison.json`."""
        write_json(self.directory / FILE, attrs.asdict(self, filter=lambda field, _: field.name != "directory"))

    def __str__(self) -> str:
        header = ["arm", *self.better, "learning rate", "trainable", "memory", "tokens/s", "adapter", "seconds"]
        lines = [["base" if scheme is None else f"base, {scheme}", *cells] for scheme, cells in self._bases()]
        lines += [[arm.name, *self._cells(arm)] for arm in self.arms]
        lines = [line + [""] * (len(header) - len(line)) for line in lines]
        # What was measured nowhere needs no column: memory on the CPU.
        kept = [at for at in range(len(header)) if at == 0 or any(line[at] not in ("", "-") for line in lines)]
        seeds = f"seeds {', '.join(map(str, self.seeds))}" if len(self.seeds) > 1 else f"seed {self.seeds[0]}"
        parts = [
            f"{self.budget} each, {seeds}" + ("; mean ± half of its 95 % interval" if len(self.seeds) > 1 else ""),
            table([header[at] for at in kept], [[line[at] for at in kept] for line in lines]),
            "\n".join(f"failed: {failure}" for failure in self.failures),
            f"{waiting} runs are not made yet" if (waiting := len(list(self._lacking())) - len(self.failures)) else "",
        ]
        return "\n\n".join(filter(None, parts))

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _row(self, arm: Arm) -> dict[str, Any]:
        row: dict[str, Any] = {"arm": arm.name, "method": arm.adapter["use"], "learning_rate": arm.learning_rate}
        for metric in self.better:
            row[metric], row[f"{metric}_interval"] = arm.mean(metric)
            row[f"base_{metric}"] = arm.mean(f"base_{metric}")[0]
        errors = "; ".join(run.error for run in arm.runs if run.error)
        return {**row, **{cost: arm.mean(cost)[0] for cost in COSTS}, "error": errors or None}

    def _lacking(self) -> Iterator[tuple[Arm, ArmRun]]:
        """The runs that did not finish."""
        return ((arm, run) for arm in self.arms for run in arm.runs if run.error)

    def _bases(self) -> Iterator[tuple[str | None, list[str]]]:
        """Each scheme that a base is stored in, and the metrics of that base."""
        for scheme in dict.fromkeys(arm.quantization for arm in self.arms):
            arms = [arm for arm in self.arms if arm.quantization == scheme]
            measured = next((arm for arm in arms if any(run.base_metrics for run in arm.runs)), None)
            if measured:
                yield scheme, [_quality(*measured.mean(f"base_{metric}")) for metric in self.better]

    def _cells(self, arm: Arm) -> list[str]:
        shown: Mapping[str, Any] = {
            "trainable_parameters": lambda number: f"{number:,.0f}",
            "peak_memory": partial(_mebibytes, digits=0),
            "tokens_per_second": lambda number: f"{number:,.0f}",
            "adapter_bytes": partial(_mebibytes, digits=2),
            "seconds": lambda number: f"{number:,.1f}",
        }
        costs = {name: arm.mean(name)[0] for name in COSTS}
        state = "failed" if any(run.error not in (None, NOT_YET) for run in arm.runs) else "unfinished"
        return [
            *(state if not arm.finished else _quality(*arm.mean(metric)) for metric in self.better),
            "-" if arm.learning_rate is None else f"{arm.learning_rate:g}",
            *("-" if costs[name] is None else show(costs[name]) for name, show in shown.items()),
        ]

    @staticmethod
    def _check(name: str, known: Mapping[str, Any] | Sequence[str]) -> None:
        if name not in known:
            raise ConfigError(f"{name!r} is none of this comparison{did_you_mean(name, known)}")


def open_comparison(directory: str | Path) -> Comparison:
    """A comparison, from its directory, finished or not; ConfigError if there is none."""
    directory = Path(directory)
    found = read_json(directory / FILE)
    arms = tuple(Arm(**{**arm, "runs": tuple(ArmRun(**run) for run in arm["runs"])}) for arm in found["arms"])
    return Comparison(**{**found, "directory": directory, "seeds": tuple(found["seeds"]), "arms": arms})


def run_directory(directory: Path, arm: str, seed: int) -> Path:
    """Where the run of an arm is."""
    return directory / arm / f"seed-{seed}"


def _figure(run: ArmRun, name: str) -> float | None:
    if name in COSTS:
        found: float | None = getattr(run, name)
        return found
    return run.base_metrics.get(name.removeprefix("base_")) if name.startswith("base_") else run.metrics.get(name)


def _quality(mean: float | None, half: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.4g}" + ("" if half is None else f" ± {half:.2g}")


def _mebibytes(size: float, digits: int) -> str:
    return f"{size / 2**20:,.{digits}f} MiB"
