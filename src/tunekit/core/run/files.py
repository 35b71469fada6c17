"""The run directory: where a run writes while it goes on, and what is read from it afterwards."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.common.secrets import redacted
from tunekit.core.common.writing import naming, replace
from tunekit.core.component import Component
from tunekit.core.registry import Registry
from tunekit.core.run import checkpoint, lock
from tunekit.core.run.checkpoint import Checkpoint
from tunekit.core.run.lock import LOCK
from tunekit.core.run.observers import Observers
from tunekit.core.training.parallel import ALONE, Processes
from tunekit.errors import ConfigError, RunExists, TrainingError

if TYPE_CHECKING:
    from torch import nn

RECIPE = "recipe.toml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
RESULT = "result.json"
START = "start.json"
LOG = "log.txt"
ADAPTER = "adapter"
EVALUATIONS = "evaluations"
CHECKPOINTS = "checkpoints"

RESUMABLE = "Checkpoints that are there are as they were: once the disk can be written, go on with resume=True"

logger = logging.getLogger(__name__)


@attrs.define(kw_only=True, eq=False)
class RunLog:
    """What a trainer sees of its run: a place to log and to save, and what a resumed run starts from.

    Args:
        directory: the run directory.
        observers: told of everything that is logged and saved.
        resumed: the checkpoint this run goes on from; None for a new run.
        method_state: what the adapter method adds to a checkpoint; set by the pipeline once it is attached.
        processes: those of the run; all call the same methods, the first writes and tells.
    """

    directory: Path
    observers: Observers
    resumed: Checkpoint | None = None
    method_state: Callable[[], Mapping[str, Any]] = dict
    processes: Processes = ALONE

    def begin(self, steps: int, notes: Iterable[str]) -> None:
        """Note how the run begins, and tell the observers that so many optimizer steps are planned."""
        for note in notes:
            self.note(note)
        if self.processes.is_first:
            self.observers.emit("tunekit_run_started", run=self, steps=steps)

    def end(self, error: BaseException | None = None) -> None:
        """Note that the run is over, and what stopped it, if anything did; and tell the observers."""
        # Where the disk is the trouble, the note cannot be written either; the error is raised all the same.
        with suppress(TrainingError):
            self.note(f"stopped by {type(error).__name__}: {error}" if error else "finished")
        if self.processes.is_first:
            self.observers.emit("tunekit_run_finished", run=self, error=error)

    def write(self, name: str, function: Callable[[Path], object]) -> None:
        """Have `function` write this part of the run directory: on the first process alone, the others wait."""

        def named() -> None:
            with naming(self.directory / name, RESUMABLE):
                function(self.directory / name)

        self.processes.first(named)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append `metrics` of `step` (0: before the first) to `metrics.jsonl` and tell the observers.

        Raises TrainingError for a figure that is not finite.
        """
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise TrainingError(f"step {step}: {name} is {value}")
        if not self.processes.is_first:
            return
        line = json.dumps({"step": step, **metrics}, allow_nan=False)
        path = self.directory / METRICS
        with naming(path, RESUMABLE), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.observers.emit("tunekit_log", run=self, step=step, metrics=metrics)

    def note(self, text: str) -> None:
        """Append a line with the time to `log.txt`, secrets taken out."""
        if not self.processes.is_first:
            return
        text = redacted(text)
        logger.info("%s", text)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        path = self.directory / LOG
        with naming(path, RESUMABLE), path.open("a", encoding="utf-8") as file:
            file.write(f"{now} {text}\n")

    def draw(self, seed: int) -> None:
        """Set the random states that training begins with: after a resume those of the checkpoint.

        The first process goes on with the states that it has. Each other draws numbers of its own, or all drop the
        same; with other processes than before the resume, they begin anew from the seed, the step and their rank.
        """
        from transformers import set_seed

        rank, states = self.processes.rank, []
        if self.resumed:
            states = [self.resumed.state["random"], *self.resumed.state.get("random_of_others", [])]
            if len(states) != self.processes.count:
                self.note(f"resumed on {self.processes.count} processes, {len(states)} before: dropout differs")
        if rank < len(states) and (rank == 0 or len(states) == self.processes.count):
            checkpoint.set_random_states(states[rank])
        elif rank:
            set_seed((seed + 7919 * rank + 104729 * (self.resumed.step if self.resumed else 0)) % 2**32)

    def save(
        self,
        step: int,
        model: nn.Module,
        trainer_state: Mapping[str, Any],
        keep: int = 1,
        best: int | None = None,
    ) -> None:
        """Write a checkpoint of `step` that a resumed run can go on from, then delete those that are not to be kept.

        Args:
            step: optimizer steps taken.
            model: its trainable parameters are stored.
            trainer_state: the trainer's own state (its optimizer's, ...): JSON values and tensors.
            keep: how many checkpoints stay, the newest.
            best: the step of one that stays besides.

        Raises:
            TrainingError: it could not be written; the file is named, and the checkpoints before are as they were. Or
                the processes of the run do not have the same parameters.
        """
        self.processes.check_same("what is trained", checkpoint.checksums(model) if self.processes.count > 1 else None)
        random, *others = self.processes.gather(checkpoint.random_states())
        state = {
            "trainer": dict(trainer_state),
            "method": dict(self.method_state()),
            "random": random,
            "random_of_others": others,
        }
        self.processes.first(partial(self._write, step, model, state, keep, best))

    def _write(self, step: int, model: nn.Module, state: Mapping[str, Any], keep: int, best: int | None) -> None:
        directory = self.directory / CHECKPOINTS
        with naming(directory / f"step-{step:06d}", RESUMABLE):
            directory.mkdir(exist_ok=True)  # not its parents: a run directory that is gone is not made again
            place = checkpoint.write(directory, step, model, state)
            checkpoint.keep_newest(directory, keep, best)
        self.note(f"saved {place.name}")
        self.observers.emit("tunekit_saved", run=self, step=step, directory=place)


def check_free(directory: Path) -> None:
    """Raise RunExists if something is in `directory` already, saying how to go on: nothing is ever overwritten."""
    if not directory.exists() or (directory.is_dir() and is_blank(directory)):
        return
    if (directory / RESULT).exists():
        state = f"holds a finished run; read it with tunekit.open_run({str(directory)!r})"
    elif any((directory / CHECKPOINTS).glob("step-*")):
        state = f"holds an unfinished run; go on with run({str(directory)!r}, resume=True)"
    elif (directory / RECIPE).exists():
        state = f"holds a run that stopped before its first checkpoint; begin it again with run({str(directory)!r}, "
        state += "resume=True)"
    else:
        raise RunExists(f"{directory} is {'a file' if directory.is_file() else 'not empty'}; choose another directory")
    raise RunExists(f"{directory} {state}, or choose another directory")


def create(directory: Path) -> None:
    """Make a new run directory. Raises RunExists if it is taken, ConfigError if it cannot be made."""
    check_free(directory)
    try:
        (directory / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the run directory {directory}: {error.strerror}", "directory") from None


def is_blank(directory: Path) -> bool:
    """Whether nothing is in `directory` but what a run makes before it writes anything."""
    made = {LOCK, CHECKPOINTS}
    return {path.name for path in directory.iterdir()} <= made and not any((directory / CHECKPOINTS).glob("*"))


@contextmanager
def taken(directory: Path, resume: bool) -> Iterator[str]:
    """A run directory that is this process's alone, made if the run is new; yields what is to be noted about its lock.

    Raises:
        RunExists: it is taken, or another process is at work in it.
        ConfigError: it cannot be made or written, or there is no run to resume.
    """
    if not resume:
        create(directory)
    elif not directory.is_dir():
        raise ConfigError(f"there is no run to resume in {directory}", "directory")
    with lock.held(directory) as note:
        if not resume:
            check_free(directory)  # another process may have been here since
        yield note


def environment(
    registry: Registry, components: Iterable[Component], device: str, dtype: str, seed: int
) -> dict[str, Any]:
    """What the run was made with: versions, plugins, device and seed; no variables, no paths, no secrets."""
    made_by = [registry.provenance(type(component)) for component in components]
    packages = {found.name: found.version for found in importlib.metadata.distributions() if found.name}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
        "plugins": [{**attrs.asdict(plugin), "error": redacted(plugin.error)} for plugin in registry.plugins()],
        "components": {found["component"]: f"{found['distribution']} {found['version']}" for found in made_by},
        "device": device,
        "dtype": dtype,
        "seed": seed,
    }


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, all of it or nothing; numbers must be finite."""
    replace(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run; ConfigError naming it if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def dtype_of(directory: Path) -> str:
    """The dtype a run was made in: on a machine of another kind, the one that is chosen by itself may be another."""
    return str(read_json(directory / ENVIRONMENT)["dtype"])


def history(directory: Path) -> list[dict[str, float]]:
    """Every logged line of `metrics.jsonl`, in order."""
    path = directory / METRICS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
