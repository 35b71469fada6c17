"""Every hook of tunekit. A plugin module decorates functions of these names with `tunekit.hookimpl`.

Components come in through `tunekit_components`; the other hooks observe a run and cannot change it. An implementation
may ask for fewer arguments than the hook offers. Per-run observers: `pipeline.run(directory, observers=[object])`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pluggy

from tunekit.core.component import Component, Kind

if TYPE_CHECKING:
    from tunekit.core.run.run_log import RunLog

PROJECT = "tunekit"
"""The import name, the group of entry points and the name of the hooks' markers."""
DISTRIBUTION = "tunekit-sdk"
"""What is installed: on PyPI, `tunekit` is another project."""
API = 1
"""Version of the plugin interface. A plugin module may state `TUNEKIT_API = 1`; with another it is not loaded."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@attrs.frozen
class Lazy:
    """A component named without importing it.

    Args:
        kind: "source", "adapter", "quantizer", "trainer" or "evaluator".
        name: the component's `name`.
        target: where its class is, as "package.module:Class".
    """

    kind: Kind
    name: str
    target: str


@hookspec
def tunekit_components() -> Sequence[type[Component] | Lazy]:  # type: ignore[empty-body]
    """Return the component classes of this plugin.

    @tunekit.hookimpl
    def tunekit_components():
        return [MyMethod, tunekit.Lazy("evaluator", "my-score", "my_package.score:MyScore")]
    """


@hookspec
def tunekit_run_started(run: RunLog, steps: int) -> None:
    """Training is about to begin: `steps` optimizer steps are planned.

    @tunekit.hookimpl
    def tunekit_run_started(run): print("writing to", run.directory)
    """


@hookspec
def tunekit_log(run: RunLog, step: int, metrics: Mapping[str, float]) -> None:
    """Metrics were logged at `step` (0 is before the first step).

    @tunekit.hookimpl
    def tunekit_log(step, metrics): dashboard.send(step, dict(metrics))
    """


@hookspec
def tunekit_saved(run: RunLog, step: int, directory: Path) -> None:
    """A whole checkpoint of `step` is in `directory`. Where it was written beside training, later steps may be logged.

    @tunekit.hookimpl
    def tunekit_saved(directory): upload(directory)
    """


@hookspec
def tunekit_run_finished(run: RunLog, error: BaseException | None) -> None:
    """The run is over; `error` is what stopped it, None when it finished.

    @tunekit.hookimpl
    def tunekit_run_finished(error): notify("failed" if error else "done")
    """
