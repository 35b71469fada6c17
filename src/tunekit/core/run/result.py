"""`Run`: a finished run, to read its figures, to ask the model, and to export it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunekit.core.common import plots, turns
from tunekit.core.common.table import html_table, table
from tunekit.core.data.codec import Message
from tunekit.core.evaluation.predicting import generate
from tunekit.core.fields import did_you_mean
from tunekit.core.model.base import Loaded
from tunekit.core.run import files
from tunekit.core.run.export import Parts, export
from tunekit.core.run.run_report import RunReport
from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Run:
    """A finished run. Its model is loaded when it is first asked for.

    Args:
        directory: the run directory.
        parts: what its models are made of.
        tuned: the tuned model, where it is in memory already.
    """

    def __init__(self, directory: Path, parts: Parts, tuned: Loaded | None = None) -> None:
        self.directory = directory
        self._parts = parts
        self._models: dict[bool, Loaded] = {} if tuned is None else {True: tuned}

    @cached_property
    def result(self) -> Mapping[str, Any]:
        """All of `result.json`."""
        found: Mapping[str, Any] = files.read_json(self.directory / files.RESULT)
        return found

    @property
    def metrics(self) -> Mapping[str, float]:
        """The evaluators' metrics of the tuned model."""
        found: Mapping[str, float] = self.result["metrics"]
        return found

    @property
    def base_metrics(self) -> Mapping[str, float]:
        """The same metrics of the base model, measured by the same code before training."""
        found: Mapping[str, float] = self.result["base_metrics"]
        return found

    @property
    def prompted_metrics(self) -> Mapping[str, Mapping[str, float]]:
        """By the name of each baseline of the pipeline ("prompted-4"), the metrics of the base with its prompts."""
        found: Mapping[str, Mapping[str, float]] = self.result.get("prompted", {})
        return found

    @cached_property
    def history(self) -> Sequence[Mapping[str, float]]:
        """What was logged, one mapping a log call, each with its "step"."""
        return files.history(self.directory)

    def plot(self, metric: str | Sequence[str] = "loss") -> Figure:
        """What was logged of a metric over the steps, as a matplotlib figure: `run.plot("loss").savefig("loss.png")`.

        Args:
            metric: a name in `history`: "loss", "learning_rate", "grad_norm", "validation/perplexity"; or several,
                which are drawn one above the other.

        Raises ConfigError for a name that was not logged, and without matplotlib.
        """
        logged = {name for line in self.history for name in line} - {"step"}
        names = [metric] if isinstance(metric, str) else list(metric)
        for name in names:
            if name not in logged:
                raise ConfigError(f"{name!r} was not logged{did_you_mean(name, logged)}", "Run.plot")
        if not names:
            raise ConfigError("names no metric", "Run.plot")
        return plots.curve(self.history, names[0]) if len(names) == 1 else plots.panels(self.history, names)

    @cached_property
    def evaluations(self) -> Mapping[str, Mapping[str, Any]]:
        """What stands behind the metrics, by evaluation: "base", "step-000040", ..., "tuned".

        Each has `metrics`, `scores` (of each held-out row, by metric), `weights` of these scores, and `details` by
        evaluator: a confusion matrix, answers.
        """
        found = sorted((self.directory / files.EVALUATIONS).glob("*.json"))
        return {path.stem: files.read_json(path) for path in found}

    def report(self) -> RunReport:
        """All of it on one HTML page: data, plan, curves, metrics, answers, notes; `run.report().save("first.html")`.

        `report.html` in the run directory is the same, as it was when the run finished.
        """
        return RunReport(self.directory)

    def generate(self, prompt: str | Sequence[Message], *, max_new_tokens: int = 128, tuned: bool = True) -> str:
        """The model's greedy answer, asked through the same template as in training.

        Args:
            prompt: what the user says, or a conversation as messages that ends before the assistant's turn.
            max_new_tokens: the answer is cut after so many tokens.
            tuned: False asks the base model instead.
        """
        with turns.turn("Run.generate"):
            loaded = self._model(tuned)
            answer = generate(loaded.model, loaded.codec.tokenizer, [loaded.codec.prompt(prompt)], max_new_tokens)
            return loaded.codec.decode(answer[0])

    def export(
        self,
        directory: str | Path,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        *,
        into_quantized: bool = False,
    ) -> Path:
        """Write the tuned model as a plain transformers directory: merged weights, tokenizer, template, stop tokens.

        A quantized base is dequantized first: what is written is as large as the model was without quantization. A
        model card (`README.md`) says what it is made of. It is read again by transformers alone and compared with the
        merged model before it is there; what was compared is in `export.json`.

        Args:
            directory: where to; it must be new or empty.
            dtype: of the written weights; None takes that of the base. The sum is made in float32 and rounded once.
            into_quantized: quantize the merged weights again, by the run's quantizer. Most of a small update is then
                rounded away; `export.json` and the model card state the loss on the held-out rows before and after.

        Raises:
            RunExists: the directory is taken.
            NotSupported: the method cannot be merged into its base, or there is nothing to quantize it with.
            ConfigError: the adapter is damaged, or not of this base and template.
            ExportError: what was written does not do what the merged model does; nothing of it is left.
        """
        with turns.turn("Run.export"):
            live = self._model(tuned=True) if into_quantized else None
            return export(self.directory, self._parts, Path(directory), dtype, live)

    def __str__(self) -> str:
        return table(*found) if (found := self._table())[1] else f"run in {self.directory}: no metrics"

    def _repr_html_(self) -> str:
        return html_table(*found) if (found := self._table())[1] else f"<p>{escape(str(self))}</p>"

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r}, metrics={json.dumps(self.metrics)})"

    def _table(self) -> tuple[list[str], list[list[str]]]:
        columns = {"base": self.base_metrics, **self.prompted_metrics, "tuned": self.metrics}
        rows = [[name, *(_show(found.get(name)) for found in columns.values())] for name in self.metrics]
        return ["metric", *columns], rows

    def _model(self, tuned: bool) -> Loaded:
        if tuned not in self._models:
            if tuned and not (self.directory / files.ADAPTER).is_dir():
                raise ConfigError(f"the run in {self.directory} is not finished: it holds no adapter yet")
            self._models[tuned] = self._parts.load(tuned)
        return self._models[tuned]


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
