"""What a trainer sees of its run: a place to log and to save, and what a resumed run starts from."""

from __future__ import annotations

import datetime
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.common.random_states import random_states, seed_everything, set_random_states
from tunekit.core.common.secrets import redacted
from tunekit.core.common.writing import naming
from tunekit.core.run import checkpoint, files
from tunekit.core.run.background import Background, copied, has_room_for
from tunekit.core.run.checkpoint import Checkpoint
from tunekit.core.run.observers import Observers
from tunekit.core.training import sharded
from tunekit.core.training.parallel import ALONE, Processes
from tunekit.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)


@attrs.define(kw_only=True, eq=False)
class RunLog:
    """What a trainer sees of its run: a place to log and to save, and what a resumed run starts from.

    Args:
        directory: the run directory.
        observers: told of everything that is logged and saved.
        resumed: the checkpoint this run goes on from; None for a new run.
        method_state: what the adapter method adds to a checkpoint; set by the pipeline once it is attached.
        load_method_state: puts that back; set as well.
        processes: those of the run; all call the same methods, the first writes and tells.
        device: where this one computes ("cpu", "cuda", "cuda:1"), whose random states are kept; None for all devices.
        saving: the checkpoint that is being written beside training, if one is.
    """

    directory: Path
    observers: Observers
    resumed: Checkpoint | None = None
    method_state: Callable[[], Mapping[str, Any]] = dict
    load_method_state: Callable[[Mapping[str, Any]], object] = dict
    processes: Processes = ALONE
    device: str | None = None
    saving: Background[tuple[int, Path]] = attrs.field(factory=Background, init=False, repr=False)

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
            self._settle()
        with suppress(TrainingError):
            self.note(f"stopped by {type(error).__name__}: {error}" if error else "finished")
        if self.processes.is_first:
            self.observers.emit("tunekit_run_finished", run=self, error=error)

    def write(self, name: str, function: Callable[[Path], object]) -> None:
        """Have `function` write this part of the run directory: on the first process alone, the others wait."""

        def named() -> None:
            self._settle()
            with naming(self.directory / name, files.RESUMABLE):
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
        if self.saving.succeeded:  # what failed is raised where all processes are: by `save`, `write` or `settle`
            self._settle()
        line = json.dumps({"step": step, **metrics}, allow_nan=False)
        path = self.directory / files.METRICS
        with naming(path, files.RESUMABLE), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.observers.emit("tunekit_log", run=self, step=step, metrics=metrics)

    def note(self, text: str) -> None:
        """Append a line with the time to `log.txt`, secrets taken out."""
        if not self.processes.is_first:
            return
        text = redacted(text)
        logger.info("%s", text)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        path = self.directory / files.LOG
        with naming(path, files.RESUMABLE), path.open("a", encoding="utf-8") as file:
            file.write(f"{now} {text}\n")

    def draw(self, seed: int) -> None:
        """Set the random states that training begins with: after a resume those of the checkpoint.

        The first process goes on with the states that it has. Each other draws numbers of its own, or all drop the
        same; with other processes than before the resume, they begin anew from the seed, the step and their rank.
        """
        rank, states = self.processes.rank, []
        if self.resumed:
            states = [self.resumed.state["random"], *self.resumed.state.get("random_of_others", [])]
            if len(states) != self.processes.count:
                self.note(f"resumed on {self.processes.count} processes, {len(states)} before: dropout differs")
        if rank < len(states) and (rank == 0 or len(states) == self.processes.count):
            set_random_states(states[rank], self.device)
        elif rank:
            seed_everything((seed + 7919 * rank + 104729 * (self.resumed.step if self.resumed else 0)) % 2**32)

    def save(
        self,
        step: int,
        model: nn.Module,
        trainer_state: Mapping[str, Any],
        keep: int = 1,
        best: int | None = None,
        background: bool = False,
    ) -> None:
        """Write a checkpoint of `step` that a resumed run can go on from, then delete those that are not to be kept.

        Args:
            step: optimizer steps taken.
            model: its trainable parameters are stored.
            trainer_state: the trainer's own state (its optimizer's, ...): JSON values and tensors.
            keep: how many checkpoints stay, the newest.
            best: the step of one that stays besides.
            background: return when everything is copied, and write beside training, where the memory has room for the
                copy. `settle` waits for it; what goes wrong is raised there, or by the next call that writes.

        Raises:
            TrainingError: it could not be written; the file is named, and the checkpoints before are as they were. Or
                the processes of the run do not have the same parameters.
        """
        self.processes.check_same("what is trained", checkpoint.checksums(model) if self.processes.count > 1 else None)
        random, *others = self.processes.gather(random_states(self.device))
        state = {
            "trainer": sharded.put_together(trainer_state, self.processes.is_first),
            "method": dict(self.method_state()),
            "random": random,
            "random_of_others": others,
        }
        with sharded.whole(model):
            parameters = checkpoint.trained_parameters(model)
            self.processes.first(partial(self._save, step, parameters, state, keep, best, background))

    def restore(self, step: int, model: nn.Module) -> None:
        """Put what is trained of `model` back as the checkpoint of `step` has it, to the last bit.

        The method's state comes back with it; the optimizer's and the random ones do not, so nothing can be trained
        afterwards. All processes call it, and each reads the file.

        Raises:
            TrainingError: the checkpoint is not as it was written, or not there.
        """
        self.settle()
        found = checkpoint.of_step(self.directory / files.CHECKPOINTS, step)
        found.load_parameters(model)
        self.load_method_state(found.state["method"])

    def settle(self) -> None:
        """Wait until no checkpoint is being written. Raises TrainingError as `save` does."""
        self.processes.first(self._settle)

    def _save(
        self,
        step: int,
        parameters: Mapping[str, Tensor],
        state: dict[str, Any],
        keep: int,
        best: int | None,
        beside: bool,
    ) -> None:
        self._settle()
        if beside and has_room_for([parameters, state]):
            self.saving.start(partial(self._write, step, copied(parameters), copied(state), keep, best))
        else:
            self._tell_saved(*self._write(step, parameters, state, keep, best))

    def _write(
        self, step: int, parameters: Mapping[str, Tensor], state: Mapping[str, Any], keep: int, best: int | None
    ) -> tuple[int, Path]:
        directory = self.directory / files.CHECKPOINTS
        with naming(directory / f"step-{step:06d}", files.RESUMABLE):
            directory.mkdir(exist_ok=True)  # not its parents: a run directory that is gone is not made again
            place = checkpoint.write(directory, step, parameters, state)
            checkpoint.keep_newest(directory, keep, best)
        return step, place

    def _settle(self) -> None:
        for step, place in self.saving.settle():
            self._tell_saved(step, place)

    def _tell_saved(self, step: int, place: Path) -> None:
        self.note(f"saved {place.name}")
        self.observers.emit("tunekit_saved", run=self, step=step, directory=place)
