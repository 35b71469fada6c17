"""Trackio: runs in a local dashboard, `trackio show`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from tunekit.core.hookspecs import hookimpl
from tunekit.core.run.run_log import RunLog
from tunekit.plugins.observers import tracking


@attrs.define(eq=False, kw_only=True)
class Trackio:
    """An observer that logs recipe, metrics and outcome to Trackio. Needs `pip install "tunekit-sdk[trackio]"`.

    Args:
        project: the project's name.
        space: a Hugging Face Space to send it to, as "user/name"; None keeps it on this machine (`TRACKIO_DIR`).
    """

    project: str = "tunekit"
    space: str | None = None
    _run: Any = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        tracking.check_installed("Trackio", "trackio")

    @hookimpl
    def tunekit_run_started(self, run: RunLog) -> None:
        """Make the run there, or go on with it."""
        import trackio

        name = tracking.name_of(run)
        config = tracking.parameters(run)
        self._run = trackio.init(
            self.project, name, space_id=self.space, config=config, resume="allow", embed=False, auto_log_cpu=False
        )

    @hookimpl
    def tunekit_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self._run.log(dict(metrics), step=step)

    @hookimpl
    def tunekit_run_finished(self, run: RunLog, error: BaseException | None) -> None:
        """Log the outcome and end the run there."""
        if found := tracking.outcome(run, error):
            self._run.log(found)
        self._run.finish()
