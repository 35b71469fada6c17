"""Harness: tasks of EleutherAI's lm-evaluation-harness, on the model that is in memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs

from tunekit.core.common.random_states import random_states_kept
from tunekit.core.component import Context
from tunekit.core.data.codec import Codec
from tunekit.core.evaluation.predicting import evaluating
from tunekit.core.fields import as_text, at_least, did_you_mean
from tunekit.core.interfaces import Encoded, Evaluator
from tunekit.core.model.quick_imports import import_bitsandbytes
from tunekit.core.outcomes import Measured
from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 8
"""Rows that the harness puts through the model together."""


def _are_metrics(instance: Any, attribute: Any, value: Any) -> None:
    if not value or not all("/" in name.strip("/") for name in value):
        raise ConfigError(
            f"must be named as task/metric, at least one, {{'arc_easy/acc_norm': 'max'}}, got {dict(value)!r}",
            "Harness.metrics",
        )


@attrs.frozen(kw_only=True)
class Harness(Evaluator):
    """Tasks by name of lm-evaluation-harness (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness).

    The harness asks the very model of the run, through its own `HFLM`, and makes the figures; its data sets come from
    the Hub, or the Hub's cache. Metrics: those that `metrics` names, which run can be compared with published ones by.
    Details: every other figure of these tasks, their versions, and the version of the harness. Tasks that run generated
    code are refused by it. The held-out rows play no part. `pip install "tunekit-sdk[harness]"`.

    Args:
        metrics: which figures of which tasks, and which direction is better: "arc_easy/acc_norm", or with the name of a
            filter, "gsm8k/exact_match,strict-match".
        shots: examples in the prompt; None for what the task says.
        chat: asks through the run's chat template, examples as talk that went before.
        max_rows: only so many rows of each task, the first; None for all.
        task_directory: a directory with task files of your own (YAML; those that name Python functions run them).
    """

    name = "harness"
    requires = ("lm_eval",)
    reads_rows = False

    metrics: Mapping[str, Literal["min", "max"]] = attrs.field(validator=_are_metrics)
    shots: int | None = attrs.field(default=None, validator=at_least(0))
    chat: bool = False
    max_rows: int | None = attrs.field(default=None, validator=at_least(1))
    task_directory: str | None = attrs.field(
        default=None, converter=as_text, metadata={"permits": "functions that its task files name"}
    )

    @property
    def better(self) -> Mapping[str, Literal["min", "max"]]:  # type: ignore[override]
        """What `metrics` says."""
        return self.metrics

    @property
    def tasks(self) -> list[str]:
        """The tasks of the metrics."""
        return list(dict.fromkeys(name.rpartition("/")[0] for name in self.metrics))

    def evaluate(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sequence[Encoded], context: Context
    ) -> Mapping[str, float]:
        """The figures of the tasks; ConfigError for a metric that the harness does not return."""
        import_bitsandbytes()  # as lm_eval does by PEFT, only quicker
        from lm_eval import __version__, simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        asking = copy.copy(tokenizer)
        asking.chat_template = Codec(tokenizer, context.template).template
        with random_states_kept(), evaluating(model):
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=asking, batch_size=AT_ONCE),
                tasks=self.tasks,
                num_fewshot=self.shots,
                limit=self.max_rows,
                apply_chat_template=self.chat,
                task_manager=TaskManager(include_path=self.task_directory),
                bootstrap_iters=0,
                random_seed=context.seed,
                numpy_random_seed=context.seed,
                torch_random_seed=context.seed,
                fewshot_random_seed=context.seed,
            )
        figures = dict(_figures(found["results"]))
        for name in self.metrics:
            if name not in figures:
                raise ConfigError(f"the harness returns no {name!r}{did_you_mean(name, figures)}", "Harness.metrics")
        return Measured(
            {name: figures[name] for name in self.metrics},
            scores=dict(_scores(found["samples"], {name: figures[name] for name in self.metrics})),
            details={
                "figures": {name: value for name, value in figures.items() if math.isfinite(value)},
                "task_versions": {name: str(version) for name, version in found["versions"].items()},
                "lm_eval": __version__,
            },
        )


def _figures(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Every figure as task/metric; of one without a filter, "none" is not said."""
    for task, figures in results.items():
        for name, value in figures.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield f"{task}/{name.removesuffix(',none')}", float(value)


def _scores(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], figures: Mapping[str, float]
) -> Iterator[tuple[str, list[float]]]:
    """For each figure that is the mean of a number a row, these numbers, in the order of the rows."""
    for name, figure in figures.items():
        task, _, metric = name.rpartition("/")
        metric, _, chosen = metric.partition(",")
        rows = [row for row in samples.get(task, ()) if row.get("filter", "none") == (chosen or "none")]
        values = [row.get(metric) for row in sorted(rows, key=lambda row: row["doc_id"])]
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        if numbers and len(numbers) == len(values) and math.isclose(sum(numbers) / len(numbers), figure, rel_tol=1e-6):
            yield name, numbers
