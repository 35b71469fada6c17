"""What a run is measured by while it goes on: speed, memory, time."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import attrs

from tunekit.core.data import batching
from tunekit.core.hookspecs import hookimpl
from tunekit.core.interfaces import Trainer
from tunekit.core.run.files import read_json, write_json
from tunekit.core.run.run_log import RunLog

MEASURED = "measured.json"
PACE = "pace.jsonl"


@attrs.define(eq=False)
class Gauge:
    """An observer of one run that writes `measured.json` into its directory when it finishes, and `pace.jsonl` before.

    - `tokens_per_second`: tokens of the training rows, padding not counted, by the time between log lines of training.
      The first step, evaluations and checkpoints are left out; null where the trainer does not say which rows a step
      takes, or where nothing is left.
    - `training_seconds`: the time of these steps, for as many steps as the run took; null if it was resumed.
    - `peak_memory`: bytes, by torch's `max_memory_allocated`, of the whole run; null on the CPU, where torch does not
      count, and what the operating system counts is of the whole process.
    - `process_growth`: bytes, on the CPU: the most that the process had in memory less what it had before the base was
      loaded, so that libraries loaded since are in it; null on CUDA, and where the process had more before.
    - `seconds`: the whole run, loading and evaluations included; null if it was resumed.

    A line of `pace.jsonl` has a step and what was measured since the line before: `tokens_per_second`, and `memory`:
    bytes, on the CPU those that the process has in memory now, on CUDA the most that were allocated up to now.

    Args:
        device: where the run is.
        tokens: of the rows of each step, from the first on; None where that is not known.
    """

    device: str
    tokens: Iterator[int] | None
    _began: float = 0.0
    _before: tuple[int, int | None] = (0, None)
    _mark: tuple[int, float] | None = None
    _passed: int = 0
    _timed_steps: int = 0
    _timed_tokens: int = 0
    _training: float = 0.0

    @hookimpl
    def tunekit_run_started(self) -> None:
        """Start to measure."""
        self._began = time.monotonic()
        self._before = self._memory(), most_resident()
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)

    @hookimpl
    def tunekit_log(self, run: RunLog, step: int, metrics: Mapping[str, float]) -> None:
        """Count the time since the last mark, if it was spent on training."""
        now = time.monotonic()
        if self._mark is not None and step > self._mark[0]:
            tokens, seconds = self._tokens(self._mark[0], step), now - self._mark[1]
            self._timed_steps += step - self._mark[0]
            self._timed_tokens += tokens or 0
            self._training += seconds
            line = {
                "step": step,
                "tokens_per_second": tokens / seconds if tokens and seconds else None,
                "memory": self._memory(),
            }
            with (run.directory / PACE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self._mark = (step, time.monotonic())  # an evaluation is logged under the step just logged: it is passed over

    @hookimpl
    def tunekit_saved(self, step: int) -> None:
        """Pass over the time a checkpoint took, unless it was written while training went on to later steps."""
        if self._mark is None or step >= self._mark[0]:
            self._mark = (step, time.monotonic())

    @hookimpl
    def tunekit_run_finished(self, run: RunLog, error: BaseException | None) -> None:
        """Write what was measured, unless the run failed."""
        if error is None:
            whole = run.resumed is None
            found = {
                "tokens_per_second": self._timed_tokens / self._training if self._timed_tokens else None,
                "training_seconds": self._training_seconds() if whole else None,
                "peak_memory": self._memory() if self.device.startswith("cuda") else None,
                "process_growth": self._growth(),
                "seconds": round(time.monotonic() - self._began, 3) if whole else None,
            }
            write_json(run.directory / MEASURED, found)

    def _tokens(self, after: int, step: int) -> int | None:
        """Tokens of the steps after one and up to another; steps are asked for in their order."""
        if self.tokens is None:
            return None
        some = list(islice(self.tokens, step - self._passed))[after - self._passed :]
        self._passed = step
        return sum(some)

    def _training_seconds(self) -> float | None:
        if self._mark is None or not self._timed_steps:
            return None
        return round(self._training / self._timed_steps * self._mark[0], 3)

    def _growth(self) -> int | None:
        (began, most_before), most = self._before, most_resident()
        if self.device.startswith("cuda") or most is None or most_before is None or most <= most_before:
            return None
        return most - began

    def _memory(self) -> int:
        if self.device.startswith("cuda"):
            import torch

            return int(torch.cuda.max_memory_allocated(self.device))
        import psutil

        return int(psutil.Process().memory_info().rss)


def measured(directory: Path) -> dict[str, Any]:
    """A run's `measured.json`; empty where there is none."""
    path = directory / MEASURED
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    return found


def most_resident() -> int | None:
    """The most bytes that this process ever had in memory; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def pace(directory: Path) -> list[dict[str, float]]:
    """The lines of a run's `pace.jsonl`, one a step: the last, where it was taken again after a resume."""
    path = directory / PACE
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.is_file() else ()
    by_step = {line["step"]: {name: value for name, value in line.items() if value is not None} for line in lines}
    return [by_step[step] for step in sorted(by_step)]


def tokens_of_steps(trainer: Trainer, lengths: Sequence[int], seed: int) -> Iterator[int] | None:
    """Tokens of the rows of each step, without end; None for a trainer without the fields `batch_size` and `order`.

    Args:
        trainer: its steps take rows as `batching.RowOrder` says.
        lengths: tokens of each training row.
        seed: of the run.
    """
    fields = attrs.fields_dict(type(trainer))
    if "batch_size" not in fields or "order" not in fields:
        return None
    size, order = trainer.batch_size, trainer.order  # type: ignore[attr-defined]
    rows = batching.RowOrder(lengths=lengths, batch_size=size, seed=seed, order=order)
    return (sum(lengths[row] for row in rows.of_step(step)) for step in count(1))
