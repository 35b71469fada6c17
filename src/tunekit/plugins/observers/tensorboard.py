"""TensorBoard: event files in the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from tunekit.core.hookspecs import hookimpl
from tunekit.core.run.run_log import RunLog
from tunekit.plugins.observers import tracking


@attrs.define(eq=False)
class TensorBoard:
    """An observer that writes every metric into `tensorboard` in the run directory, for `tensorboard --logdir runs`.

    Needs `pip install "tunekit-sdk[tensorboard]"`. The recipe is there as text; metrics before and after training stand
    at step 0 and at the last step, as `base/...` and `tuned/...`.
    """

    _writer: Any = attrs.field(default=None, init=False)
    _step: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        tracking.check_installed("TensorBoard", "tensorboard")

    @hookimpl
    def tunekit_run_started(self, run: RunLog) -> None:
        """Open the event file; what was written after the step that a resumed run goes on from is not shown."""
        from torch.utils.tensorboard import SummaryWriter

        self._step = run.resumed.step if run.resumed else 0
        purge = self._step + 1 if run.resumed else None
        self._writer = SummaryWriter(str(run.directory / "tensorboard"), purge_step=purge)
        lines = [f"    {name} = {value}" for name, value in tracking.parameters(run).items()]
        self._writer.add_text("recipe", "\n".join(lines), self._step)

    @hookimpl
    def tunekit_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write each metric at its step."""
        self._step = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    @hookimpl
    def tunekit_run_finished(self, run: RunLog, error: BaseException | None) -> None:
        """Write the outcome and close the file."""
        for name, value in tracking.outcome(run, error).items():
            self._writer.add_scalar(name, value, 0 if name.startswith("base/") else self._step)
        self._writer.close()
