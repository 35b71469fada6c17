"""What was planned of a run beside what was measured, for its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def planned_and_measured(
    result: Mapping[str, Any],
    planned: Mapping[str, Any],
    measured: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
) -> list[list[str]]:
    """What was planned beside what was measured, a line each; a dash where one of them is not known.

    Args:
        result: what `result.json` says.
        planned: what `overview.json` says of the plan.
        measured: what `measured.json` says.
        history: what was logged.
    """
    rates = [line["learning_rate"] for line in history if "learning_rate" in line]
    parameters = result["parameters"]
    share = parameters["trainable"] / parameters["total"]
    speed, training = measured.get("tokens_per_second"), measured.get("training_seconds")
    resumes = len(result["resumes"])
    return [
        ["optimizer steps", number(planned.get("steps")), number(result["training"]["steps"])],
        ["highest learning rate", number(planned.get("learning_rate")), number(max(rates, default=None))],
        ["trained parameters", "-", f"{parameters['trainable']:,} of {parameters['total']:,} ({share:.2%})"],
        ["seconds", "-", f"{result['seconds']:,.1f}" + (" since it was resumed" if resumes else "")],
        *([["of them training", "-", f"{training:,.1f}"]] if training else []),
        *([["tokens a second", "-", f"{speed:,.0f}"]] if speed else []),
        *_memory(planned.get("memory"), measured),
        *([["resumed", "-", f"{resumes} time{'s' * (resumes != 1)}"]] if resumes else []),
    ]


def _memory(planned: Mapping[str, int] | None, measured: Mapping[str, Any]) -> list[list[str]]:
    """The peak that was planned for a step beside that of the whole run, its evaluations included.

    On the CPU torch does not count. What the process grew by is rough: it loads libraries, too, and uses again what was
    free in it.
    """
    expected = f"{sum(planned.values()) / 2**20:,.0f} MiB in a training step" if planned else "-"
    peak, growth = measured.get("peak_memory"), measured.get("process_growth")
    found = f"{peak / 2**20:,.0f} MiB in the whole run" if peak else "-"
    if growth:
        found = f"the process grew by {growth / 2**20:,.0f} MiB, libraries and evaluations included"
    return [["peak memory", expected, found]] if (expected, found) != ("-", "-") else []


def number(value: float | None) -> str:
    """A figure to be read; a dash for None."""
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
