"""The run directory: where a run writes while it goes on, and what is read from it afterwards."""

from __future__ import annotations

import json
import logging
import platform
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.common import distributions
from tunekit.core.common.secrets import redacted
from tunekit.core.common.writing import replace
from tunekit.core.component import Component
from tunekit.core.registry import Registry
from tunekit.core.run import lock
from tunekit.core.run.lock import LOCK
from tunekit.errors import ConfigError, RunExists

if TYPE_CHECKING:
    pass

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
    """What the run was made with: versions, plugins, device, threads, seed; no variables, no paths, no secrets."""
    import torch

    made_by = [registry.provenance(type(component)) for component in components]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _packages(tuple((place, _changed(place)) for place in sys.path)),
        "plugins": [{**attrs.asdict(plugin), "error": redacted(plugin.error)} for plugin in registry.plugins()],
        "components": {found["component"]: f"{found['distribution']} {found['version']}" for found in made_by},
        "device": device,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


@cache
def _packages(places: tuple[tuple[str, float], ...]) -> dict[str, str]:
    """The versions of what is installed in `places`, each with the time it last changed: reading them takes a while."""
    return distributions.packages([place for place, _ in places])


def _changed(place: str) -> float:
    try:
        return Path(place).stat().st_mtime
    except OSError:
        return 0


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
