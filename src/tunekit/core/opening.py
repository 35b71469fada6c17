"""Pipelines and runs from their files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from tunekit.core import recipe
from tunekit.core.fields import types_of
from tunekit.core.interfaces import DataSource, Example
from tunekit.core.model.trust import ALLOW
from tunekit.core.pipeline import Pipeline
from tunekit.core.registry import default_registry
from tunekit.core.run import files
from tunekit.core.run.result import Run
from tunekit.errors import ConfigError, UnknownComponent


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


def open_run(directory: str | Path, *, trust_remote_code: bool = False) -> Run:
    """A finished run, from its directory; ConfigError if there is none.

    Its data, trainer and evaluators need not be installed: they are asked for where held-out rows are to be read again.

    Args:
        directory: the run directory.
        trust_remote_code: see `load`; of a run whose pipeline lets code in the model's repository run.

    Raises UnknownComponent, with what is to be installed, where nobody offers its method or its quantizer any more.
    """
    directory = Path(directory)
    if not (directory / files.RESULT).is_file():
        state = "is not finished" if (directory / files.RECIPE).is_file() else "is not there"
        raise ConfigError(f"the run in {directory} {state}", "directory")
    path = directory / files.RECIPE
    # Nothing is measured any more: what its evaluators may do does not matter.
    reopened = _read(path, trust_remote_code, _for_its_models)
    return reopened._finished(directory, held_out=lambda codec: _read(path, trust_remote_code)._held_out(codec))


@attrs.frozen(kw_only=True)
class _Unread(DataSource):
    """Stands for the data of a run that is opened."""

    name = "unread"

    def load(self, split: str) -> Iterable[Example]:
        raise NotImplementedError


def _for_its_models(table: Mapping[str, Any]) -> Pipeline:
    """The pipeline of a recipe as far as its models are made of it."""
    types = types_of(Pipeline)
    if not table.keys() <= types.keys():
        return Pipeline.from_dict(table)  # which says what is wrong
    registry = default_registry()
    left_out = ("data", "validation", "trainer", "evaluators", "baselines")
    kept = {name: value for name, value in table.items() if name not in left_out}
    fields = {name: recipe.from_table(value, types[name], registry, f"recipe.{name}") for name, value in kept.items()}
    return Pipeline(data=_Unread(), validation=0.0, evaluators=(), **fields)


def _read(path: str | Path, trust_remote_code: bool, make: Callable[[Any], Pipeline] = Pipeline.from_dict) -> Pipeline:
    try:
        table = recipe.read(Path(path))
        if table.get("trust_remote_code") and not trust_remote_code:
            raise ConfigError(
                f"lets the code in the repository of {table.get('model')!r} run; if you trust that code, say so: "
                f"{ALLOW} to the call that reads this file",
                "recipe.trust_remote_code",
            )
        return make(table)
    except ConfigError as error:
        named = error.where.startswith(str(path))
        raise error if named else ConfigError(error.message, f"{path}: {error.where}") from None
    except UnknownComponent as error:
        raise UnknownComponent(f"{path}: {error}{_made_with(Path(path).parent, str(error))}") from None


def _made_with(directory: Path, problem: str) -> str:
    """What the files of a run know about the component that a problem is about: whose it was, and how to get it."""
    try:
        known = files.read_json(directory / files.ENVIRONMENT)["components"]
    except (ConfigError, KeyError, TypeError):
        return ""  # a recipe by itself, or one of a run that is damaged otherwise
    for component, origin in known.items():
        kind, _, name = component.partition("/")
        distribution, _, version = origin.partition(" ")
        if f"no {kind} is named {name!r}" in problem or f"no {kind} is named {f'{distribution}/{name}'!r}" in problem:
            if distribution == "local":
                return f". The run was made with a class of the module {version!r}: import it first"
            return f". The run was made with {origin}: pip install {distribution}=={version}"
    return ""
