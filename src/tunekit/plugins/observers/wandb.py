"""Wandb: runs at Weights & Biases, or offline for a later `wandb sync`."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, Literal

import attrs

from tunekit.core.hookspecs import hookimpl
from tunekit.core.run.run_log import RunLog
from tunekit.plugins.observers import tracking


@attrs.define(eq=False, kw_only=True)
class Wandb:
    """An observer that logs recipe, metrics and outcome to Weights & Biases. Needs `pip install "tunekit-sdk[wandb]"`.

    Args:
        project: the project's name.
        mode: "offline" writes into the run directory only; None takes wandb's own (`WANDB_MODE`, else online).
    """

    project: str = "tunekit"
    mode: Literal["online", "offline"] | None = None
    _run: Any = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        tracking.check_installed("Wandb", "wandb")

    @hookimpl
    def tunekit_run_started(self, run: RunLog) -> None:
        """Make the run there, or go on with it."""
        import wandb

        self._run = wandb.init(
            project=self.project,
            name=tracking.name_of(run),
            id=tracking.identity(run, "wandb", lambda: uuid.uuid4().hex),
            resume="allow",
            mode=self.mode,
            dir=str(run.directory),
            config=tracking.parameters(run),
            reinit="create_new",  # a run of the user's own in this process stays as it is
        )

    @hookimpl
    def tunekit_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self._run.log(dict(metrics), step=step)

    @hookimpl
    def tunekit_run_finished(self, run: RunLog, error: BaseException | None) -> None:
        """Put the outcome into the summary and end the run there."""
        self._run.summary.update(tracking.outcome(run, error))
        self._run.finish(exit_code=int(error is not None))
