"""`RunReport`: a finished run on one HTML page, without network or scripts, from what its directory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.core import recipe
from tunekit.core.common import plots
from tunekit.core.common.secrets import redacted
from tunekit.core.component import Context
from tunekit.core.data.codec import Codec
from tunekit.core.interfaces import Trainer
from tunekit.core.memory.memory_plan import MemoryPlan
from tunekit.core.run import files, overview
from tunekit.core.run.gauge import measured, pace
from tunekit.core.run.html_report import HtmlReport, drawn, environment_lines
from tunekit.core.run.model_card import fields_line, portable
from tunekit.core.run.planned import number, planned_and_measured
from tunekit.core.run.run_log import RunLog
from tunekit.errors import TrainingError

if TYPE_CHECKING:
    from tunekit.core.data.dataset import Data

FILE = "report.html"
MOST_CURVES = 12
"""A page with more curves than this is not looked at, and takes long to draw."""
MOST_LINES = 20
"""So many lines of figures stand for the curves where they cannot be drawn."""
FEWEST_STEPS = 8
"""Speed and memory of fewer steps are no curve."""
LONG_ENOUGH = 10.0
"""Seconds: the memory of a shorter run is not counted for its report, which would take a good part of that time."""
FIRST_CURVES = ("loss", "learning_rate", "grad_norm")
NOT_CURVES = ("step", "tokens", "skipped", "stopped")
ROUTINE = ("started", "saved ", "finished")
"""How lines of the log begin that every run has."""


class RunReport(HtmlReport):
    """A report on a run, finished: shows itself in a notebook, and writes one HTML file that needs no network.

    Everything is read from the run directory: neither the data nor the model is needed.

    Args:
        directory: the run directory.
    """

    title = "tunekit run"
    body = ("tunekit.core.run", "run_report.html")

    def _content(self) -> dict[str, Any]:
        place = self.directory
        result, environment = (files.read_json(place / name) for name in (files.RESULT, files.ENVIRONMENT))
        table, kept = recipe.read(place / files.RECIPE), _optional(place / overview.OVERVIEW)
        evaluations = {name: _optional(place / files.EVALUATIONS / f"{name}.json") for name in ("base", "tuned")}
        history = files.history(place)
        return {
            "name": place.resolve().name,
            "call": repr(place.resolve().name),
            "adapter": repr(f"{place.resolve().name}/{files.ADAPTER}"),
            "by_peft": (place / files.ADAPTER / "adapter_config.json").is_file(),
            "model": portable(table["model"]),
            "made_of": _made_of(table),
            "data": _data(result),
            "lengths": _lengths(kept["lengths"]) if kept else None,
            "preview": overview.preview(kept).html() if kept else None,
            "plan": planned_and_measured(result, kept.get("planned", {}), measured(place), history),
            "metrics": _metrics(result, evaluations),
            "prompted": list(result.get("prompted", {})),
            "curves": _curves([*history, *_pace(place, environment["device"])]),
            "figures": _figures(history),
            "samples": _samples(evaluations),
            "notes": _notes(place / files.LOG),
            "environment": environment_lines(environment),
        }


def leave(
    log: RunLog,
    data: Data,
    codec: Codec,
    trainer: Trainer,
    context: Context,
    memory: MemoryPlan | None,
    settled: Callable[[], tuple[object, MemoryPlan | None]],
) -> None:
    """Write `overview.json` and `report.html` of a run that finished.

    Whatever goes wrong is noted in the log and raises nothing: the run is good without its report. Of several processes
    the first writes them.

    Args:
        log: of the run.
        data: its rows.
        codec: by which they were encoded.
        trainer: its trainer.
        context: its facts.
        memory: the plan it began with; None where there was so much memory that none was made.
        settled: makes one now, beside the precision.
    """
    if not log.processes.is_first:
        return
    try:
        if memory is None and files.read_json(log.directory / files.RESULT)["seconds"] >= LONG_ENOUGH:
            memory = _planned_late(log, settled)
        planned = {
            "steps": context.total_steps,
            "learning_rate": trainer.peak_learning_rate(context),
            "memory": dict(memory.parts) if memory else None,
        }
        overview.write(log.directory, data, codec, planned)
        RunReport(log.directory).save(log.directory / FILE)
    except Exception as error:
        with suppress(TrainingError):  # a full disk takes no note either
            log.note(f"there is no {FILE}: {type(error).__name__}: {redacted(str(error))}")


def _planned_late(log: RunLog, settled: Callable[[], tuple[object, MemoryPlan | None]]) -> MemoryPlan | None:
    try:
        return settled()[1]
    except Exception as error:  # whatever a model of somebody else's raises on the meta device
        log.note(f"the memory of a step could not be planned: {type(error).__name__}: {redacted(str(error))}")
        return None


def _optional(path: Path) -> dict[str, Any]:
    """A file that not every run has; empty where there is none."""
    found: dict[str, Any] = files.read_json(path) if path.is_file() else {}
    return found


def _made_of(table: Mapping[str, Any]) -> list[list[str]]:
    """The parts of the pipeline, by recipe name, and their fields."""
    parts = [(kind, table[kind]) for kind in ("data", "adapter", "quantizer", "trainer") if kind in table]
    parts += [("evaluator", found) for found in table.get("evaluators", [])]
    return [[kind, found["use"], fields_line(found)] for kind, found in parts]


def _data(result: Mapping[str, Any]) -> list[list[str]]:
    rows, tokens = result["rows"], result["tokens"]
    share = f" ({tokens['supervised'] / tokens['train']:.1%})" if tokens["train"] else ""
    return [
        ["training rows", f"{rows['train']:,}"],
        ["held-out rows", f"{rows['validation']:,}"],
        ["tokens in one pass", f"{tokens['train']:,}"],
        ["of them learned", f"{tokens['supervised']:,}{share}"],
        *([reason, f"{count:,} row{'s' * (count != 1)}"] for reason, count in rows["changed"].items()),
    ]


def _metrics(result: Mapping[str, Any], evaluations: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Each metric of base, prompted and tuned model, with its interval where it has one, and of what tuning gains.

    Of a metric that is no mean over rows, the interval is the one that its evaluator states among the details.
    """
    intervals = result.get("intervals", {}).get("metrics", {})
    stated = {model: dict(_stated(kept.get("details", {}))) for model, kept in evaluations.items()}
    lines = []
    for name, value in result["metrics"].items():
        found, before = intervals.get(name, {}), result["base_metrics"].get(name)
        around = {model: found.get(model) or its.get(f"{name}_interval") for model, its in stated.items()}
        gain = f"{_span(found['difference'])}, p = {found['p']:.2g}" if found else "-"
        shown = []
        for label, metrics in result.get("prompted", {}).items():
            compared = found.get("prompted", {}).get(label, {})
            shown.append(_with(metrics.get(name), compared.get("interval")))
            if compared:
                gain += f"; to {label}: {_span(compared['difference'])}, p = {compared['p']:.2g}"
        lines.append([name, _with(before, around["base"]), *shown, _with(value, around["tuned"]), gain])
    return lines


def _stated(details: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for found in details.values():
        if isinstance(found, Mapping):
            yield from found.items()


def _curves(history: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """The names and SVGs of what was logged; none without matplotlib."""
    if not find_spec("matplotlib"):
        return []
    return [(name, drawn(plots.curve(history, name), name)) for name in _names(history)[:MOST_CURVES]]


def _pace(place: Path, device: str) -> list[dict[str, float]]:
    """Speed and memory over the steps; none of a run so short that nothing could be seen."""
    memory = "peak memory so far (MiB)" if device.startswith("cuda") else "memory of the process (MiB)"
    lines = [
        {"step": line["step"], "tokens a second": line.get("tokens_per_second"), memory: line["memory"] / 2**20}
        for line in pace(place)
    ]
    known = [{name: value for name, value in line.items() if value is not None} for line in lines]
    return known if len(known) >= FEWEST_STEPS else []


def _lengths(histogram: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The histogram of lengths as an SVG; without matplotlib as a table."""
    edges, counts = histogram["edges"], histogram["counts"]
    spans = [f"{low} to {high - 1}" if high - low > 1 else str(low) for low, high in pairwise(edges)]
    table = [[span, f"{count:,}"] for span, count in zip(spans, counts, strict=True) if count]
    svg = drawn(plots.histogram(edges, counts, "tokens"), "lengths") if find_spec("matplotlib") else None
    return {"svg": svg, "table": table}


def _figures(history: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What was logged as a table of some lines, evenly spread, the first and the last among them."""
    names, by_step = _names(history), dict[int, dict[str, float]]()
    for line in history:
        by_step.setdefault(int(line["step"]), {}).update(line)
    steps = sorted(by_step)
    if len(steps) > MOST_LINES:
        steps = sorted({steps[round(at * (len(steps) - 1) / (MOST_LINES - 1))] for at in range(MOST_LINES)})
    return {
        "header": ["step", *names],
        "lines": [[step, *(_cell(by_step[step], name) for name in names)] for step in steps],
    }


def _names(history: Sequence[Mapping[str, float]]) -> list[str]:
    """What was logged, the loss and what was measured first."""
    logged = [name for name in dict.fromkeys(name for line in history for name in line) if name not in NOT_CURVES]
    measured = [name for name in logged if name.startswith("validation/")]
    first = [FIRST_CURVES[0], *measured, *FIRST_CURVES[1:]]
    return [name for name in first if name in logged] + [name for name in logged if name not in first]


def _samples(evaluations: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Prompt, the base's answer and the tuned model's, of every evaluator that kept answers to prompts."""
    base, tuned = (dict(_answers(evaluations[name].get("details", {}))) for name in ("base", "tuned"))
    return [[prompt, base.get((name, prompt), "-"), answer] for (name, prompt), answer in tuned.items()]


def _answers(details: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    for name, found in details.items():
        answers = found.get("answers") if isinstance(found, Mapping) else None
        for one in answers if isinstance(answers, list) else ():
            if isinstance(one, Mapping) and {"prompt", "answer"} <= one.keys():
                yield (name, str(one["prompt"])), str(one["answer"])


def _notes(path: Path) -> list[str]:
    """The lines of the log that not every run has; without the times."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    said = [line.partition(" ")[2] for line in lines]
    return [line for line in dict.fromkeys(said) if line and not line.startswith(ROUTINE)]


def _cell(line: Mapping[str, float], name: str) -> str:
    return f"{line[name]:.4g}" if name in line else ""


def _span(interval: Sequence[float]) -> str:
    return f"{interval[0]:.4g} to {interval[1]:.4g}"


def _with(value: float | None, interval: Sequence[float] | None) -> str:
    return number(value) + (f" ({_span(interval)})" if interval else "")
