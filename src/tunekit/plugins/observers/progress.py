"""Shows a run as it goes: a bar in a terminal or a notebook, a plain line now and then elsewhere.

`TUNEKIT_PROGRESS=quiet` shows nothing, `TUNEKIT_PROGRESS=lines` plain lines in a terminal, too.
"""

from __future__ import annotations

import html
import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import attrs

from tunekit.core.hookspecs import hookimpl
from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from IPython.display import DisplayHandle
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from tunekit.core.run.run_log import RunLog

LINES = 10
"""Plain lines in a whole run."""


@attrs.define
class _Bar:
    """A bar drawn by rich."""

    progress: Progress
    task: TaskID

    def show(self, step: int, text: str) -> None:
        self.progress.update(self.task, completed=step, metrics=text)

    def close(self) -> None:
        self.progress.stop()


@attrs.define
class _NotebookBar:
    """A bar in the output of a notebook's cell; plain HTML, so that it needs no widgets."""

    steps: int
    handle: DisplayHandle

    def show(self, step: int, text: str) -> None:
        self.handle.update(_html(self.steps, step, text))

    def close(self) -> None:
        """The finished bar stays in the notebook."""


@attrs.define
class _Lines:
    """About ten lines for the whole run, for logs and pipes."""

    steps: int

    def show(self, step: int, text: str) -> None:
        if step % max(1, self.steps // LINES) == 0 or step == self.steps:
            print(f"step {step}/{self.steps}  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is left open."""


_shown: WeakKeyDictionary[RunLog, _Bar | _NotebookBar | _Lines] = WeakKeyDictionary()
_logged: WeakKeyDictionary[RunLog, tuple[int, float]] = WeakKeyDictionary()
"""The step of the last line, and when it came."""


@hookimpl
def tunekit_run_started(run: RunLog, steps: int) -> None:
    """Open the bar."""
    from rich.console import Console

    wanted = os.environ.get("TUNEKIT_PROGRESS", "")
    if wanted not in ("", "quiet", "lines"):
        raise ConfigError(f"must be 'quiet', 'lines' or unset, got {wanted!r}", "TUNEKIT_PROGRESS")
    if wanted == "quiet":
        return
    console = Console(stderr=True)
    if wanted == "lines":
        _shown[run] = _Lines(steps)
    elif console.is_jupyter:
        _shown[run] = _notebook_bar(steps)
    else:
        _shown[run] = _bar(console, steps) if console.is_terminal else _Lines(steps)


@hookimpl
def tunekit_log(run: RunLog, step: int, metrics: Mapping[str, float]) -> None:
    """Move the bar on, if the start of this run was seen (a trainer's own test has none)."""
    if run in _shown:
        bar, shown = _shown[run], [f"{name} {value:.4g}" for name, value in metrics.items()]
        if not isinstance(bar, _Lines):
            shown += [*_speed(run, step, metrics), f"memory {_memory(run.device) / 2**20:,.0f} MiB"]
        bar.show(step, "  ".join(shown))


@hookimpl
def tunekit_run_finished(run: RunLog) -> None:
    """Close the bar, if there is one."""
    if run in _shown:
        _shown.pop(run).close()


def _speed(run: RunLog, step: int, metrics: Mapping[str, float]) -> list[str]:
    """Supervised tokens a second since the line before; with several steps in between, as if all had as many."""
    now = time.monotonic()
    before, _logged[run] = _logged.get(run), (step, now)  # an evaluation is a line too, and its time passed over
    if before is None or "tokens" not in metrics or step <= before[0]:
        return []
    return [f"{metrics['tokens'] * (step - before[0]) / max(1e-9, now - before[1]):,.0f} supervised tokens/s"]


def _memory(device: str | None) -> int:
    """Bytes: the most that were allocated on the run's GPU where it has one, else those of the process now."""
    if device and device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


def _bar(console: Console, steps: int) -> _Bar:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[metrics]}"))
    progress = Progress(*columns, console=console)
    progress.start()
    return _Bar(progress, progress.add_task("training", total=steps, metrics=""))


def _notebook_bar(steps: int) -> _NotebookBar:
    from IPython.display import display

    return _NotebookBar(steps, display(_html(steps, 0, ""), display_id=True))


def _html(steps: int, step: int, text: str) -> object:
    from IPython.display import HTML

    return HTML(f'<progress value="{step}" max="{steps}"></progress> {step}/{steps} <code>{html.escape(text)}</code>')
