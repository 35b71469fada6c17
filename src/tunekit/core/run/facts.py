"""What a run is known by, and how the run in a directory differs from it: in what is asked for, not in names.

A pipeline says of many things what they are called or where they lie, of others nothing. The run has a hash of the rows
and of the base, and what was settled: where these are the same, it is the same run, however it is put.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from tunekit.core import recipe
from tunekit.core.component import Component, Context
from tunekit.core.data.codec import Codec
from tunekit.core.model import fingerprint
from tunekit.core.model.base import Base
from tunekit.core.registry import default_registry
from tunekit.core.run import files
from tunekit.core.run.files import ENVIRONMENT, RECIPE, START, read_json, write_json
from tunekit.errors import ConfigError

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "numpy", "tokenizers", "safetensors")
"""Packages whose version may change the last bits of a result: a change is noted, and no reason to refuse."""


OF_BASE, OF_ROWS = ("model", "revision"), ("data", "validation")
"""Fields of the recipe that say where the base and the rows come from."""


@attrs.frozen(kw_only=True)
class Chosen:
    """What a run has settled where its pipeline leaves it open, by its `environment.json`: a resume goes on with it.

    None for what it does not say.

    Args:
        dtype: of the base's weights, by torch's name.
        device: "cpu", "cuda" or "cuda:1".
        threads: those that torch computes with on the CPU.
    """

    dtype: str | None = None
    device: str | None = None
    threads: int | None = None

    @classmethod
    def by(cls, directory: Path) -> Chosen:
        """What the run in `directory` has settled; nothing where there is none."""
        found = _read(directory / ENVIRONMENT)
        return cls(**{field.name: found.get(field.name) for field in attrs.fields(cls)})


@attrs.frozen(kw_only=True)
class Facts:
    """What a run is known by. All of it must be the same when it is resumed.

    Args:
        recipe: the pipeline's, as a table.
        environment: versions of components and packages, device and dtype.
        data: the fingerprint of the rows.
        template: the chat template.
        base: the fingerprint of the base.
    """

    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    data: str
    template: str
    base: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        table: Mapping[str, Any],
        components: Iterable[Component],
        base: Base,
        codec: Codec,
        rows: str,
        context: Context,
    ) -> Facts:
        """Those of a run on this machine, whose context says what was settled."""
        environment = files.environment(default_registry(), components, context.device, context.dtype, context.seed)
        known = fingerprint.fingerprint(base)
        return cls(recipe=table, environment=environment, data=rows, template=codec.template, base=known)

    def write(self, directory: Path) -> None:
        """Write recipe and environment: with them a run begins."""
        recipe.write(directory / RECIPE, self.recipe)
        write_json(directory / ENVIRONMENT, self.environment)

    def start(self, directory: Path, measured: Mapping[str, Any], resumes: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write `start.json`: what was measured of the base, and every time that the run was resumed."""
        known = {"data": self.data, "template": self.template, "base": self.base}
        write_json(directory / START, {**measured, **known, "resumes": list(resumes)})


def changes(directory: Path, facts: Facts) -> list[str]:
    """How the run in `directory` differs from `facts` in what matters, as "field: old -> new"."""
    start, then = _read(directory / START), _read(directory / ENVIRONMENT)
    same_rows = start.get("data") == facts.data
    left_out = (*same_by_hash(start, facts.base, facts.data), "device")
    if then.get("dtype") == facts.environment["dtype"]:
        left_out = (*left_out, "dtype")
    changed = recipe_changes(directory, facts.recipe, left_out)
    if then:
        if not changed:  # with another recipe, other components are no news
            old, new = (_components(each, same_rows) for each in (then, facts.environment))
            changed += recipe.differences(old, new, "components")
        changed += recipe.differences(then["dtype"], facts.environment["dtype"], "dtype")
    if start:
        changed += recipe.differences(start["data"][:12], facts.data[:12], "fingerprint of the rows")
        changed += recipe.differences(start["template"], facts.template, "template")
        try:
            fingerprint.check_same(start["base"], facts.base, "the base")
        except ConfigError as error:
            changed.append(str(error))
    return changed


def same_by_hash(start: Mapping[str, Any], base: Mapping[str, Any], rows: str | None) -> tuple[str, ...]:
    """The fields of a recipe that need not be compared: the hashes in `start.json` say that what they name is the same.

    Args:
        start: what is in `start.json`; empty where there is none.
        base: the fingerprint of the base.
        rows: that of the rows; None where they are not known.
    """
    same_base = bool(start) and fingerprint.is_same(start["base"], base)
    same_rows = bool(start) and start["data"] == rows
    return (*(OF_BASE if same_base else ()), *(OF_ROWS if same_rows else ()))


def recipe_changes(directory: Path, table: Mapping[str, Any], left_out: Sequence[str]) -> list[str]:
    """How the recipe in `directory` differs from `table`, but for some fields; nothing where there is none."""
    if not (directory / RECIPE).is_file():
        return []
    then = recipe.read(directory / RECIPE)
    old, new = ({name: each[name] for name in each if name not in left_out} for each in (then, table))
    return recipe.differences(old, new)


def moved(directory: Path, facts: Facts) -> list[str]:
    """What the recipe in `directory` calls otherwise though it is the same, as "field: old -> new"."""
    if not (directory / RECIPE).is_file():
        return []
    then, same = recipe.read(directory / RECIPE), same_by_hash(_read(directory / START), facts.base, facts.data)
    return [
        f"the same by its hash: {line}"
        for name in same
        for line in recipe.differences(then.get(name), facts.recipe.get(name), f"recipe.{name}")
    ]


def library_changes(directory: Path, facts: Facts) -> list[str]:
    """Versions of libraries, Python, the device and its threads, where they differ; the last bits may too."""
    then, now = _read(directory / ENVIRONMENT), facts.environment
    if not then:
        return []
    changed = [
        line
        for name in LIBRARIES
        for line in recipe.differences(then["packages"].get(name), now["packages"].get(name), name)
    ]
    for name in ("python", "device"):
        changed += recipe.differences(then[name], now[name], name)
    if "threads" in then and now["device"] == "cpu" == then["device"]:
        changed += recipe.differences(then["threads"], now["threads"], "threads")
    return changed


def _components(environment: Mapping[str, Any], same_rows: bool) -> dict[str, str]:
    """The components and their versions; without sources, where it is known what came of them."""
    found: Mapping[str, str] = environment["components"]
    return {name: version for name, version in found.items() if not (same_rows and name.startswith("source/"))}


def _read(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.is_file() else {}
