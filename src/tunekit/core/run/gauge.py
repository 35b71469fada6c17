"""What a run of a comparison is measured by while it goes on: speed, peak memory, time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from itertools import islice

import attrs

from tunekit.core.hookspecs import hookimpl
from tunekit.core.model.base import choose_device
from tunekit.core.run.files import write_json
from tunekit.core.run.run_log import RunLog

MEASURED = "measured.json"


@attrs.define(eq=False)
class Gauge:
    """An observer of one run that writes `measured.json` into its directory when it finishes.

    - `tokens_per_second`: tokens of the training rows, padding not counted, by the time between log lines of training.
      The first step, evaluations and checkpoints are left out; null where the trainer does not say which rows a step
      takes, or where nothing is left.
    - `peak_memory`: bytes, by torch's `max_memory_allocated`, of the whole run; null on the CPU, where torch does not
      count, and what the operating system counts is of the whole process.
    - `seconds`: the whole run, loading and evaluations included; null if it was resumed.

    Args:
        device: where the run is; None for the one that is chosen there.
        tokens: of the rows of each step, from the first on; None where that is not known.
    """

    device: str | None
    tokens: Iterable[int] | None
    _began: float = 0.0
    _mark: tuple[int, float] | None = None
    _timed: set[int] = attrs.field(factory=set)
    _training: float = 0.0

    @hookimpl
    def tunekit_run_started(self) -> None:
        """Start to measure."""
        self._began = time.monotonic()
        self.device = choose_device(self.device)
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)

    @hookimpl
    def tunekit_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Count the time since the last mark, if it was spent on training."""
        now = time.monotonic()
        if self._mark is not None and step > self._mark[0]:
            self._timed |= set(range(self._mark[0] + 1, step + 1))
            self._training += now - self._mark[1]
        self._mark = (step, now)  # an evaluation is logged under the step just logged: its time is passed over

    @hookimpl
    def tunekit_saved(self, step: int) -> None:
        """Pass over the time a checkpoint took."""
        self._mark = (step, time.monotonic())

    @hookimpl
    def tunekit_run_finished(self, run: RunLog, error: BaseException | None) -> None:
        """Write what was measured, unless the run failed."""
        if error is None:
            found = {
                "tokens_per_second": self._speed(),
                "peak_memory": self._peak(),
                "seconds": None if run.resumed else round(time.monotonic() - self._began, 3),
            }
            write_json(run.directory / MEASURED, found)

    def _speed(self) -> float | None:
        if self.tokens is None or not self._timed or not self._training:
            return None
        per_step = enumerate(islice(self.tokens, max(self._timed)), start=1)
        return sum(tokens for step, tokens in per_step if step in self._timed) / self._training

    def _peak(self) -> int | None:
        if self.device is None or not self.device.startswith("cuda"):
            return None
        import torch

        return int(torch.cuda.max_memory_allocated(self.device))
