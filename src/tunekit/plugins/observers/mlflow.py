"""Mlflow: runs in an MLflow tracking store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from tunekit.core.hookspecs import hookimpl
from tunekit.core.run.run_log import RunLog
from tunekit.plugins.observers import tracking


@attrs.define(eq=False, kw_only=True)
class Mlflow:
    """An observer that logs recipe, metrics and outcome to MLflow. Needs `pip install "tunekit-sdk[mlflow]"`.

    MLflow has telemetry of its own, which `MLFLOW_DISABLE_TELEMETRY=true` switches off.

    Args:
        experiment: the experiment's name; made if it is not there.
        tracking_uri: the store or server; None takes MLflow's own (`MLFLOW_TRACKING_URI`).
    """

    experiment: str = "tunekit"
    tracking_uri: str | None = None
    _client: Any = attrs.field(default=None, init=False)
    _run: str = attrs.field(default="", init=False)

    def __attrs_post_init__(self) -> None:
        tracking.check_installed("Mlflow", "mlflow")

    @hookimpl
    def tunekit_run_started(self, run: RunLog) -> None:
        """Make the run there, or go on with it."""
        from mlflow import MlflowClient

        self._client = client = MlflowClient(self.tracking_uri)
        found = client.get_experiment_by_name(self.experiment)
        where = found.experiment_id if found else client.create_experiment(self.experiment)
        name = tracking.name_of(run)
        self._run = tracking.identity(run, "mlflow", lambda: client.create_run(where, run_name=name).info.run_id)
        for key, value in tracking.parameters(run).items() if not run.resumed else ():
            client.log_param(self._run, key, value)

    @hookimpl
    def tunekit_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log each metric at its step."""
        for name, value in metrics.items():
            self._client.log_metric(self._run, name, value, step=step)

    @hookimpl
    def tunekit_run_finished(self, run: RunLog, error: BaseException | None) -> None:
        """Log the outcome and end the run there."""
        for name, value in tracking.outcome(run, error).items():
            self._client.log_metric(self._run, name, value)
        self._client.set_terminated(self._run, "FAILED" if error else "FINISHED")
