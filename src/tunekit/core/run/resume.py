"""Going on with a run: only as the run that it was, unless it is forced; and then what changed is recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import attrs

from tunekit.core import recipe
from tunekit.core.common.writing import replace
from tunekit.core.run import checkpoint
from tunekit.core.run.checkpoint import Checkpoint
from tunekit.core.run.facts import Facts, changes, library_changes, moved
from tunekit.core.run.files import (
    ADAPTER,
    CHECKPOINTS,
    METRICS,
    RECIPE,
    RESULT,
    START,
    is_blank,
    read_json,
    taken,
)
from tunekit.core.training.parallel import ALONE, Processes
from tunekit.errors import ConfigError

Resume = bool | Literal["force"]


@attrs.frozen(kw_only=True)
class Opened:
    """A run directory, locked, and what the run in it goes on from.

    Args:
        directory: where it is.
        facts: of the run.
        checkpoint: the newest whole one; None for a run that begins.
        changed: what a forced resume goes on in spite of.
        libraries: versions of libraries that are others than before, and the device.
        moved: what has another name or place than before, and is the same.
        notes: what is to be written to the log.
        writes: whether this process is the one that writes.
    """

    directory: Path
    facts: Facts
    checkpoint: Checkpoint | None = None
    changed: Sequence[str] = ()
    libraries: Sequence[str] = ()
    moved: Sequence[str] = ()
    notes: Sequence[str] = ()
    writes: bool = True

    def start(self, base_metrics: Mapping[str, float], prompted: Mapping[str, Mapping[str, float]]) -> None:
        """Write down what the base measures, with a longer prompt too: the run that begins has come so far."""
        if self.writes:
            self.facts.start(self.directory, {"base_metrics": dict(base_metrics), "prompted": prompted})

    def record(self) -> None:
        """Write down that the run was resumed, what changed, and where all is now: its checkpoint was found to fit."""
        if not self.writes:
            return
        started = read_json(self.directory / START)
        step = self.checkpoint.step if self.checkpoint else 0
        lists = {name: list(getattr(self, name)) for name in ("changed", "libraries", "moved")}
        if self.changed:
            self.facts.write(self.directory)
        else:  # with the base and the rows where they are now: the run is opened from it
            recipe.write(self.directory / RECIPE, self.facts.recipe)
        measured = {"base_metrics": started["base_metrics"], "prompted": started.get("prompted", {})}
        self.facts.start(self.directory, measured, [*started["resumes"], {"step": step, **lists}])


@contextmanager
def opened(directory: Path, facts: Facts, steps: int, resume: Resume, processes: Processes = ALONE) -> Iterator[Opened]:
    """A run directory, locked, with recipe and environment in it, and what the run goes on from.

    The first process opens it; the others read the checkpoint, and must see the directory.

    Args:
        directory: where it is; made if the run is new.
        facts: of the run.
        steps: the optimizer steps it plans.
        resume: False for a new run; "force" to go on though facts changed.
        processes: those of the run.

    Raises:
        RunExists: it is taken, or another process is at work in it.
        ConfigError: it cannot be made, or not be gone on with; see `reopen`.
    """
    with ExitStack() as stack:
        found = processes.first(lambda: stack.enter_context(_opened(directory, facts, steps, resume)))
        if found is None:
            newest = checkpoint.newest(directory / CHECKPOINTS) if resume else None
            found = Opened(directory=directory, facts=facts, checkpoint=newest, writes=False)
        processes.check_same("the checkpoint to go on from", found.checkpoint and found.checkpoint.step)
        yield found


@contextmanager
def _opened(directory: Path, facts: Facts, steps: int, resume: Resume) -> Iterator[Opened]:
    with taken(directory, bool(resume)) as note:
        found = Opened(directory=directory, facts=facts, notes=("started",))
        if resume:
            found = reopen(directory, facts, steps, resume == "force")
        if found.checkpoint is None:
            facts.write(directory)
        yield attrs.evolve(found, notes=(note, *found.notes) if note else found.notes)


def reopen(directory: Path, facts: Facts, steps: int, force: bool) -> Opened:
    """What the unfinished run in `directory` goes on from; what it logged afterwards is forgotten.

    Args:
        directory: the run directory, locked.
        facts: of the pipeline that wants to go on with it.
        steps: the optimizer steps it plans.
        force: go on though facts changed.

    Raises:
        ConfigError: there is no unfinished run, or it was started by another pipeline, with other rows, or by other
            versions of components; each changed field is named with both values. The run is left as it is.
    """
    if (directory / RESULT).exists():
        where = str(directory)
        raise ConfigError(f"the run in {where} is finished; read it with tunekit.open_run({where!r})", "directory")
    if not (directory / RECIPE).is_file() and not is_blank(directory):
        raise ConfigError(f"there is no run to resume in {directory}", "directory")
    _check_within(directory)
    found = checkpoint.newest(directory / CHECKPOINTS)
    if found and found.step > steps:
        raise ConfigError(f"{found.directory} is of step {found.step}, and {steps} steps are planned", "resume")
    changed = changes(directory, facts)
    if changed and not force:
        listed = "\n  ".join(changed)
        raise ConfigError(
            f"the run in {directory} was started otherwise (resume='force' goes on all the same, and records it):\n"
            f"  {listed}",
            "resume",
        )
    libraries, elsewhere = library_changes(directory, facts), moved(directory, facts)
    checkpoint.clear_scratch(directory / CHECKPOINTS)
    shutil.rmtree(directory / ADAPTER, ignore_errors=True)
    _forget_after(directory / METRICS, found.step if found else -1)
    if found is None:
        notes = ("began again: there was no checkpoint to go on from", *changed, *libraries, *elsewhere)
        return Opened(directory=directory, facts=facts, notes=notes)
    forced = [f"forced, though changed: {line}" for line in changed]
    return Opened(
        directory=directory,
        facts=facts,
        checkpoint=found,
        changed=changed,
        libraries=libraries,
        moved=elsewhere,
        notes=(*forced, *libraries, *elsewhere, f"resumed at step {found.step}"),
    )


def _check_within(directory: Path) -> None:
    """Raise ConfigError for a link that leads out of the run directory: what is written would be written there."""
    for path in directory.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(directory.resolve()):
            raise ConfigError(
                f"{path} is a link out of the run directory; a run writes into its own alone", "directory"
            )


def _forget_after(metrics: Path, step: int) -> None:
    """Drop what was logged after `step`: the resumed run logs it again."""
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        replace(metrics, "".join(kept))
