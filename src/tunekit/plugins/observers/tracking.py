"""What observers that tell a tracker of a run share: the recipe as parameters, the outcome, the run's name there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tunekit.core import recipe
from tunekit.core.common.writing import replace
from tunekit.core.run.files import RECIPE, RESULT, read_json
from tunekit.core.run.run_log import RunLog
from tunekit.errors import ConfigError

LONGEST = 250
"""Characters of a parameter; trackers refuse long ones, and rows in a recipe are long."""


def check_installed(observer: str, package: str) -> None:
    """Raise ConfigError with the install line if `package` is missing, before a run that it was meant to follow."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{observer} needs {package}: pip install {package}")


def name_of(run: RunLog) -> str:
    """What a run is called: the last two names of its directory, since `seed-0` alone says little."""
    return "/".join(run.directory.resolve().parts[-2:])


def parameters(run: RunLog) -> dict[str, Any]:
    """The recipe of a run as flat parameters: "trainer.learning_rate"."""
    return dict(_flat(recipe.read(run.directory / RECIPE)))


def outcome(run: RunLog, error: BaseException | None) -> dict[str, float]:
    """Metrics of base and tuned model, as "base/perplexity" and "tuned/perplexity"; none of a run that failed."""
    if error is not None:
        return {}
    result = read_json(run.directory / RESULT)
    parts = {"base": result["base_metrics"], "tuned": result["metrics"]}
    return {f"{part}/{name}": value for part, metrics in parts.items() for name, value in metrics.items()}


def identity(run: RunLog, tracker: str, make: Callable[[], str]) -> str:
    """What the tracker knows the run by: kept in the run directory, so that a resumed run is the same one there."""
    path = run.directory / f"{tracker}.id"
    if not path.exists():
        replace(path, make())
    return path.read_text(encoding="utf-8")


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, bool | int | float) else str(value)[:LONGEST]
