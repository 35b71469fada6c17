"""The run directory: where a run writes while it goes on, and what is read from it afterwards."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import math
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core import checkpoint, recipe
from tunekit.core.checkpoint import Checkpoint
from tunekit.core.observers import Observers
from tunekit.core.registry import Registry
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
CHECKPOINTS = "checkpoints"

logger = logging.getLogger(__name__)


@attrs.define(kw_only=True, eq=False)
class RunLog:
    """What a trainer sees of its run: a place to log and to save, and what a resumed run starts from.

    Args:
        directory: the run directory.
        observers: told of everything that is logged and saved.
        resumed: the checkpoint this run goes on from; None for a new run.
        method_state: what the adapter method adds to a checkpoint; set by the pipeline once it is attached.
    """

    directory: Path
    observers: Observers
    resumed: Checkpoint | None = None
    method_state: Callable[[], Mapping[str, Any]] = dict

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append `metrics` of `step` (0: before the first) to `metrics.jsonl` and tell the observers.

        Raises TrainingError for a figure that is not finite.
        """
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise TrainingError(f"step {step}: {name} is {value}")
        line = json.dumps({"step": step, **metrics}, allow_nan=False)
        with (self.directory / METRICS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.observers.emit("tunekit_log", run=self, step=step, metrics=metrics)

    def note(self, text: str) -> None:
        """Append a line with the time to `log.txt`."""
        logger.info("%s", text)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with (self.directory / LOG).open("a", encoding="utf-8") as file:
            file.write(f"{now} {text}\n")

    def save(self, step: int, model: nn.Module, trainer_state: Mapping[str, Any], keep: int = 1) -> None:
        """Write a checkpoint of `step` that a resumed run can go on from, then delete all but the newest `keep`.

        Args:
            step: optimizer steps taken.
            model: its trainable parameters are stored.
            trainer_state: the trainer's own state (optimizer, schedule): JSON values and tensors.
            keep: how many checkpoints stay.
        """
        state = {
            "trainer": dict(trainer_state),
            "method": dict(self.method_state()),
            "random": checkpoint.random_states(),
        }
        place = checkpoint.write(self.directory / CHECKPOINTS, step, model, state)
        checkpoint.keep_newest(self.directory / CHECKPOINTS, keep)
        self.note(f"saved {place.name}")
        self.observers.emit("tunekit_saved", run=self, step=step, directory=place)


def check_free(directory: Path) -> None:
    """Raise RunExists if something is in `directory` already, saying how to go on: nothing is ever overwritten."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if (directory / RESULT).exists():
        state = f"holds a finished run; read it with tunekit.open_run({str(directory)!r})"
    elif any((directory / CHECKPOINTS).glob("step-*")):
        state = f"holds an unfinished run; go on with run({str(directory)!r}, resume=True)"
    elif (directory / RECIPE).exists():
        state = "holds a run that stopped before its first checkpoint; delete it"
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


def reopen(directory: Path, table: Mapping[str, Any], fingerprint: str) -> Checkpoint:
    """The checkpoint that an unfinished run goes on from; what it logged afterwards is forgotten.

    Args:
        directory: the run directory.
        table: the recipe of the pipeline that wants to go on with it.
        fingerprint: that of its rows.

    Raises:
        ConfigError: there is no unfinished run with a checkpoint, or it was started by another pipeline or with other
            rows; each changed field is named. The run is left as it is.
    """
    if not (directory / RECIPE).is_file():
        raise ConfigError(f"there is no run to resume in {directory}", "directory")
    if (directory / RESULT).exists():
        where = str(directory)
        raise ConfigError(f"the run in {where} is finished; read it with tunekit.open_run({where!r})", "directory")
    _check_within(directory)
    found = checkpoint.newest(directory / CHECKPOINTS)
    if changed := recipe.differences(recipe.read(directory / RECIPE), table):
        raise ConfigError(
            f"the run in {directory} was started by another pipeline; changed: {'; '.join(changed)}", "resume"
        )
    if read_json(directory / START)["data"] != fingerprint:
        raise ConfigError(f"the rows are not those that the run in {directory} was started with", "resume")
    _forget_after(directory / METRICS, found.step)
    return found


def environment(registry: Registry, device: str, dtype: str, seed: int) -> dict[str, Any]:
    """What the run was made with: versions, plugins, device and seed; no variables, no paths, no secrets."""
    packages = {found.name: found.version for found in importlib.metadata.distributions() if found.name}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
        "plugins": [attrs.asdict(plugin) for plugin in registry.plugins()],
        "device": device,
        "dtype": dtype,
        "seed": seed,
    }


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON; numbers must be finite."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


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
        metrics.write_text("".join(kept), encoding="utf-8")
