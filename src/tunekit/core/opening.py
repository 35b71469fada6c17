"""Pipelines and runs from their files."""

from __future__ import annotations

from pathlib import Path

from tunekit.core import recipe
from tunekit.core.model.trust import ALLOW
from tunekit.core.pipeline import Pipeline
from tunekit.core.run import files
from tunekit.core.run.result import Run
from tunekit.errors import ConfigError


def load(path: str | Path, *, trust_remote_code: bool = False) -> Pipeline:
    """The pipeline in a TOML recipe.

    Args:
        path: the recipe.
        trust_remote_code: whether a recipe that lets code run is taken: in the model's repository, or what the model
            writes. The file alone cannot allow it, since it may be somebody else's.

    Raises:
        ConfigError: with file, dotted path and a suggestion if it is wrong.
    """
    pipeline = _read(path, trust_remote_code)
    for where, permitted in () if trust_remote_code else recipe.permissions(pipeline):
        raise ConfigError(
            f"lets {permitted} run; if you trust it, say so: {ALLOW} to the call that reads this file",
            f"{path}: {where}",
        )
    return pipeline


def _read(path: str | Path, trust_remote_code: bool) -> Pipeline:
    try:
        table = recipe.read(Path(path))
        if table.get("trust_remote_code") and not trust_remote_code:
            raise ConfigError(
                f"lets the code in the repository of {table.get('model')!r} run; if you trust that code, say so: "
                f"{ALLOW} to the call that reads this file",
                "recipe.trust_remote_code",
            )
        return Pipeline.from_dict(table)
    except ConfigError as error:
        named = error.where.startswith(str(path))
        raise error if named else ConfigError(error.message, f"{path}: {error.where}") from None


def open_run(directory: str | Path, *, trust_remote_code: bool = False) -> Run:
    """A finished run, from its directory; ConfigError if there is none.

    Args:
        directory: the run directory.
        trust_remote_code: see `load`; of a run whose pipeline lets code in the model's repository run.
    """
    directory = Path(directory)
    if not (directory / files.RESULT).is_file():
        state = "is not finished" if (directory / files.RECIPE).is_file() else "is not there"
        raise ConfigError(f"the run in {directory} {state}", "directory")
    # Nothing is measured any more: what its evaluators may do does not matter.
    return _read(directory / files.RECIPE, trust_remote_code)._finished(directory)
