"""`ComparisonReport`: a comparison on one HTML page, without network or scripts, from what its directory holds."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tunekit.core.common import plots
from tunekit.core.comparison.arm_runs import COSTS, Arm, ArmRun, run_directory
from tunekit.core.run import files
from tunekit.core.run.html_report import HtmlReport, drawn, environment_lines
from tunekit.core.run.model_card import fields_line
from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from tunekit.core.comparison.comparison import Comparison

SHOWN_COSTS = {"trainable_parameters": "trained parameters", "seconds": "seconds", "peak_memory": "peak memory (bytes)"}
"""The costs that quality is drawn against, where they were measured."""
MOST_CURVES = 6


class ComparisonReport(HtmlReport):
    """A report on a comparison, finished or not: shows itself in a notebook, and writes one HTML file.

    Everything is read from the directories of the comparison and its runs: neither data nor models are needed.

    Args:
        comparison: what `tunekit.compare` or `tunekit.open_comparison` returned.
    """

    title = "tunekit comparison"
    body = ("tunekit.core.comparison", "comparison_report.html")

    def __init__(self, comparison: Comparison) -> None:
        super().__init__(comparison.directory)
        self.comparison = comparison

    def _content(self) -> dict[str, Any]:
        found, name = self.comparison, self.directory.resolve().name
        colours = dict(zip([arm.name for arm in found.arms], plots.colours(len(found.arms)), strict=True))
        header, lines = found.table()
        metric = next(iter(found.better), "")
        best = self._best(metric)
        return {
            "name": name,
            "call": repr(name),
            "title": found.title,
            "waiting": found.waiting,
            "header": [one.replace("_", " ") for one in header],
            "lines": [(colours[line[0]][0] if line[0] in colours else None, line) for line in lines],
            "metric": metric.replace("_", " "),
            "least": found.better.get(metric) == "min",
            "several": len(found.seeds) > 1,
            "prompted": any(arm.baselines for arm in found.arms),
            "best": best and {"title": f"{best.name} has the best {metric.replace('_', ' ')}"},
            "chosen": repr(best.name if best else found.arms[0].name),
            "failures": found.failures,
            "drawable": find_spec("matplotlib") is not None,
            "plots": self._plots(metric, colours) if find_spec("matplotlib") and list(self._runs()) else [],
            "legend": [(colour, arm) for arm, (colour, _) in colours.items()],
            "made_of": [[arm.name, arm.adapter["use"], fields_line(arm.adapter)] for arm in found.arms],
            "environment": self._environment(),
        }

    def _best(self, metric: str) -> Arm | None:
        try:
            return self.comparison.best(metric)
        except ConfigError:  # nothing is held out, or nothing finished
            return None

    def _plots(self, metric: str, colours: dict[str, tuple[str, str]]) -> list[tuple[str, str, list[tuple[str, str]]]]:
        """Sections of figures: heading, what is seen, and captions with SVGs."""
        found = self.comparison
        against = []
        for cost, words in SHOWN_COSTS.items() if metric else ():
            points = found.points(metric, cost, {name: colour for name, (colour, _) in colours.items()})
            if points:
                better = (COSTS[cost], found.better[metric])
                figure = plots.against(points, (words, metric), better, found.base(metric), legend=False)
                against.append((f"{metric.replace('_', ' ')} against {words}", drawn(figure, f"against {cost}")))
        lines = []
        for arm, run in self._runs():
            colour, style = colours[arm.name]
            history = files.history(self._place(arm, run))
            lines.append(plots.Line(history, colour, style, 1.0 if run.seed == found.seeds[0] else 0.35))
        logged = dict.fromkeys(name for line in lines for one in line.history for name in one)
        names = ["loss", *(name for name in logged if name.startswith("validation/")), "grad_norm", "learning_rate"]
        curves = [(name, drawn(plots.side_by_side(lines, name), name)) for name in names if name in logged]
        front = "The dashed line joins those that no other beats in both; the dotted one is the base, without training."
        several = " The first seed is drawn full, the others pale." if len(found.seeds) > 1 else ""
        return [
            ("Quality and cost", front, against),
            ("Curves", f"Every arm over its optimizer steps.{several}", curves[:MOST_CURVES]),
        ]

    def _environment(self) -> list[list[str]]:
        """Of the first run that finished: all of them share it but for what the method brings."""
        for arm, run in self._runs():
            return environment_lines(files.read_json(self._place(arm, run) / files.ENVIRONMENT))
        return []

    def _runs(self) -> Iterator[tuple[Arm, ArmRun]]:
        """Those that finished."""
        return ((arm, run) for arm in self.comparison.arms for run in arm.runs if run.error is None)

    def _place(self, arm: Arm, run: ArmRun) -> Path:
        return run_directory(self.directory, arm.name, run.seed)
