"""`Comparison`: methods side by side, as a table, as plain rows, as a plot, and as a file."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.common import plots
from tunekit.core.common.table import html_table, table
from tunekit.core.comparison.arm_runs import COSTS, NOT_YET, Arm, ArmRun, Direction, run_directory
from tunekit.core.comparison.comparison_report import ComparisonReport
from tunekit.core.fields import did_you_mean
from tunekit.core.opening import open_run
from tunekit.core.run.files import read_json, write_json
from tunekit.core.run.result import Run
from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "comparison.json"


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
            cost: "trainable_parameters", "peak_memory", "tokens_per_second", "adapter_bytes", "seconds" or
                "training_seconds".

        Raises ConfigError without matplotlib, and for a name that is neither.
        """
        self._check(metric, self.better)
        self._check(cost, COSTS)
        better = (COSTS[cost], self.better[metric])
        return plots.against(self.points(metric, cost), (cost, metric), better, self.base(metric))

    def points(self, metric: str, cost: str, colours: Mapping[str, str] | None = None) -> list[plots.Point]:
        """What `plot` draws: an arm a point, of those that have both figures; `colours` by arm, None for any."""
        points = []
        for arm in self.arms:
            (quality, interval), (spent, _) = arm.mean(metric), arm.mean(cost)
            if quality is not None and spent is not None:
                points.append(plots.Point(arm.name, spent, quality, interval, (colours or {}).get(arm.name)))
        return points

    def base(self, metric: str) -> float | None:
        """The metric without training; None where it was not measured, or the arms stand on different bases."""
        bases = {arm.mean(f"base_{metric}")[0] for arm in self.arms} - {None}
        return bases.pop() if len(bases) == 1 else None

    def save(self) -> None:
        """Write `comparison.json`."""
        write_json(self.directory / FILE, attrs.asdict(self, filter=lambda field, _: field.name != "directory"))

    def __str__(self) -> str:
        parts = [
            self.title,
            table(*self.table()),
            "\n".join(f"failed: {failure}" for failure in self.failures),
            self.waiting,
        ]
        return "\n\n".join(filter(None, parts))

    def _repr_html_(self) -> str:
        lines = [f"failed: {failure}" for failure in self.failures] + [self.waiting]
        below = "".join(f"<p>{html.escape(line)}</p>" for line in lines if line)
        return f"<p>{html.escape(self.title)}</p>{html_table(*self.table())}{below}"

    @property
    def title(self) -> str:
        """The budget and the seeds in a line."""
        seeds = f"seeds {', '.join(map(str, self.seeds))}" if len(self.seeds) > 1 else f"seed {self.seeds[0]}"
        return f"{self.budget} each, {seeds}" + ("; mean ± half of its 95 % interval" if len(self.seeds) > 1 else "")

    @property
    def waiting(self) -> str:
        """How many runs are still to be made, as a sentence; empty for none."""
        count = len(list(self._lacking())) - len(self.failures)
        return f"{count} run{'s are' if count != 1 else ' is'} not made yet" if count else ""

    def table(self) -> tuple[list[str], list[list[str]]]:
        """The header and the rows of the table as texts: what was not trained, and every arm in the order given."""
        header = ["arm", *self.better, "learning rate", "trainable", "memory", "tokens/s", "adapter", "seconds"]
        header += ["steps", "training"] if self._in_time else []
        lines = [*self._bases(), *([arm.name, *self._cells(arm)] for arm in self.arms)]
        lines = [line + [""] * (len(header) - len(line)) for line in lines]
        # What was measured nowhere needs no column: memory on the CPU.
        kept = [at for at in range(len(header)) if at == 0 or any(line[at] not in ("", "-") for line in lines)]
        return [header[at] for at in kept], [[line[at] for at in kept] for line in lines]

    def report(self) -> ComparisonReport:
        """All of it on one HTML page: table, plots, curves, failures; `comparison.report().save("methods.html")`."""
        return ComparisonReport(self)

    def _row(self, arm: Arm) -> dict[str, Any]:
        row: dict[str, Any] = {"arm": arm.name, "method": arm.adapter["use"], "learning_rate": arm.learning_rate}
        for metric in self.better:
            row[metric], row[f"{metric}_interval"] = arm.mean(metric)
            row[f"base_{metric}"] = arm.mean(f"base_{metric}")[0]
            row |= {f"{name}_{metric}": arm.mean(metric, name)[0] for name in arm.baselines}
        errors = "; ".join(run.error for run in arm.runs if run.error)
        return {**row, **{cost: arm.mean(cost)[0] for cost in COSTS}, "error": errors or None}

    def _lacking(self) -> Iterator[tuple[Arm, ArmRun]]:
        """The runs that did not finish."""
        return ((arm, run) for arm in self.arms for run in arm.runs if run.error)

    def _bases(self) -> Iterator[list[str]]:
        """What was not trained: a line for each scheme that a base is stored in, and for each longer prompt to it."""
        for scheme in dict.fromkeys(arm.quantization for arm in self.arms):
            arms = [arm for arm in self.arms if arm.quantization == scheme]
            measured = next((arm for arm in arms if any(run.base_metrics for run in arm.runs)), None)
            if measured:
                stored = "" if scheme is None else f", {scheme}"
                yield [f"base{stored}", *(_quality(*measured.mean(f"base_{metric}")) for metric in self.better)]
                for name in measured.baselines:
                    yield [f"{name}{stored}", *(_quality(*measured.mean(metric, name)) for metric in self.better)]

    @property
    def _in_time(self) -> bool:
        """Whether the arms were trained for as long, not for as many steps."""
        return any(len({arm.runs[at].steps for arm in self.arms}) > 1 for at in range(len(self.seeds)))

    def _cells(self, arm: Arm) -> list[str]:
        shown: Mapping[str, Any] = {
            "trainable_parameters": lambda number: f"{number:,.0f}",
            "peak_memory": partial(_mebibytes, digits=0),
            "tokens_per_second": lambda number: f"{number:,.0f}",
            "adapter_bytes": partial(_mebibytes, digits=2),
            "seconds": lambda number: f"{number:,.1f}",
        }
        costs = {name: arm.mean(name)[0] for name in COSTS}
        steps = ", ".join(dict.fromkeys(f"{run.steps:,}" for run in arm.runs))
        took = costs["training_seconds"]
        in_time = [steps, "-" if took is None else f"{took:,.1f} s"] if self._in_time else []
        state = "failed" if any(run.error not in (None, NOT_YET) for run in arm.runs) else "unfinished"
        return [
            *(state if not arm.finished else _quality(*arm.mean(metric)) for metric in self.better),
            "-" if arm.learning_rate is None else f"{arm.learning_rate:g}",
            *("-" if costs[name] is None else show(costs[name]) for name, show in shown.items()),
            *in_time,
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


def _quality(mean: float | None, half: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.4g}" + ("" if half is None else f" ± {half:.2g}")


def _mebibytes(size: float, digits: int) -> str:
    return f"{size / 2**20:,.{digits}f} MiB"
