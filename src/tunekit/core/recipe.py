"""Recipes: attrs objects to and from plain tables and TOML. Strict: no unknown field, no wrong type, each error a path.

A component is a table with its name under `use` and its fields beside it. TOML has no null, so None is written by
leaving the field out; a field that may be None must therefore default to None (the conformance kit checks it). A field
with `metadata={"recipe": False}` holds Python objects and is no part of the recipe; one with `{"permits": what}` lets
code run, which a file that may be somebody else's cannot allow by itself.
"""

from __future__ import annotations

import inspect
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from tunekit.core.common import secrets
from tunekit.core.common.writing import replace
from tunekit.core.component import Component
from tunekit.core.fields import check_type, describe, did_you_mean, is_union, types_of
from tunekit.core.registry import Registry
from tunekit.errors import AmbiguousComponent, ConfigError, PluginError, UnknownComponent

FORMAT = 1
"""Version of the recipe format, written as `tunekit = 1`."""


def to_table(value: Any, registry: Registry, where: str = "recipe") -> Any:
    """A plain structure of dict, list, str, int, float and bool that `from_table` turns into an equal object.

    Every field is written that is not None, so a saved recipe does not change its meaning when a default does.
    Raises ConfigError, naming the field, for a value that TOML cannot hold.
    """
    if isinstance(value, Component) or attrs.has(type(value)):
        names = [field.name for field in attrs.fields(type(value)) if field.metadata.get("recipe", True)]
        written = _entries({name: getattr(value, name) for name in names}, registry, where)
        return {"use": registry.spelling(type(value)), **written} if isinstance(value, Component) else written
    if isinstance(value, Mapping):
        return _entries(value, registry, where)
    if isinstance(value, tuple | list):
        return [to_table(item, registry, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"cannot be written to a recipe: {type(value).__name__} {value!r}", where)


def from_table(value: Any, annotation: Any, registry: Registry, where: str = "recipe") -> Any:
    """The object of type `annotation` that `value`, a plain structure, describes; the inverse of `to_table`.

    Raises ConfigError with the dotted path of the field, what was expected and what was found.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if inspect.isclass(annotation) and issubclass(annotation, Component):
        return _component(value, annotation, registry, where)
    if inspect.isclass(annotation) and attrs.has(annotation):
        return _object(value, annotation, registry, where)
    if is_union(annotation):
        return _union(value, arguments, annotation, registry, where)
    if origin is tuple and isinstance(value, list):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(arguments) == len(value):
            pairs = enumerate(zip(value, arguments, strict=True))
            return tuple(from_table(item, kind, registry, f"{where}[{index}]") for index, (item, kind) in pairs)
    if inspect.isclass(origin) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {key: from_table(item, arguments[1], registry, f"{where}.{key}") for key, item in value.items()}
    check_type(value, annotation, where)
    return value


def read(path: Path) -> dict[str, Any]:
    """The table in a TOML file, its format checked and taken off. Raises ConfigError naming the file."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe: {error.strerror}", str(path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"is no TOML: {error}", str(path)) from None
    return without_format(table, str(path))


def without_format(table: Mapping[str, Any], where: str = "recipe") -> dict[str, Any]:
    """`table` without its `tunekit = 1`; raises ConfigError for a recipe of another format."""
    found = table.get("tunekit", FORMAT)
    if found != FORMAT or isinstance(found, bool):
        raise ConfigError(f"written for recipe format {found!r}, this tunekit reads {FORMAT}", where)
    return {key: value for key, value in table.items() if key != "tunekit"}


def write(path: Path, table: Mapping[str, Any]) -> None:
    """Write `table` as a TOML recipe, all of it or nothing; ConfigError for one with a secret in it."""
    import tomli_w

    secrets.check_recipe(table)
    replace(path, tomli_w.dumps({"tunekit": FORMAT, **table}))


def permissions(value: Any, where: str = "recipe") -> Iterator[tuple[str, str]]:
    """Each field within an object that is set and lets code run: its dotted path, and what it permits in words."""
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from permissions(item, f"{where}[{index}]")
    elif attrs.has(type(value)):
        for field in attrs.fields(type(value)):
            found = getattr(value, field.name)
            if found and "permits" in field.metadata:
                yield f"{where}.{field.name}", field.metadata["permits"]
            yield from permissions(found, f"{where}.{field.name}")


def differences(old: Any, new: Any, where: str = "recipe") -> list[str]:
    """How two recipes differ, as "path: old -> new"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = dict.fromkeys([*new, *old])
        return [line for name in names for line in differences(old.get(name), new.get(name), f"{where}.{name}")]
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]


def _entries(fields: Mapping[str, Any], registry: Registry, where: str) -> dict[str, Any]:
    """Every entry that is not None, as TOML can hold it."""
    kept = {str(name): item for name, item in fields.items() if item is not None}
    return {name: to_table(item, registry, f"{where}.{name}") for name, item in kept.items()}


def _component(value: Any, interface: type[Component], registry: Registry, where: str) -> Component:
    kind = interface.kind
    if not isinstance(value, Mapping):
        raise ConfigError(f"expected a table with `use` (one of {', '.join(registry.names(kind))})", where)
    if not isinstance(value.get("use"), str):
        raise ConfigError(f"missing: name the {kind} ({', '.join(registry.names(kind))})", f"{where}.use")
    try:
        cls = registry.find(kind, value["use"])
    except (UnknownComponent, AmbiguousComponent, PluginError) as error:
        raise type(error)(f"{where}.use: {error}") from None
    fields = {key: item for key, item in value.items() if key != "use"}
    made = _object(fields, cls, registry, where)
    assert isinstance(made, Component)
    return made


def _object(value: Any, cls: type, registry: Registry, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"expected a table, got {type(value).__name__} {value!r}", where)
    types = types_of(cls)
    for key in value:
        if key not in types:
            raise ConfigError(f"unknown field{did_you_mean(key, types)}", f"{where}.{key}")
    for field in attrs.fields(cls):
        if field.default is attrs.NOTHING and field.name not in value:
            raise ConfigError(
                f"missing; it is required and of type {describe(types[field.name])}", f"{where}.{field.name}"
            )
    made = {key: from_table(item, types[key], registry, f"{where}.{key}") for key, item in value.items()}
    try:
        return cls(**made)
    except ConfigError as error:
        # Validators name the class's field (`LoRA.rank`); a reader of the recipe looks for its place there.
        raise ConfigError(error.message, error.where.replace(cls.__name__, where, 1) or where) from None
    except (TypeError, ValueError) as error:  # attrs' own validators and converters know no path
        raise ConfigError(str(error.args[0] if error.args else error), where) from error


def _union(value: Any, options: tuple[Any, ...], annotation: Any, registry: Registry, where: str) -> Any:
    if isinstance(value, Mapping):
        for option in options:
            if inspect.isclass(option) and (issubclass(option, Component) or attrs.has(option)):
                return from_table(value, option, registry, where)
    for option in options:
        try:
            return from_table(value, option, registry, where)
        except ConfigError:
            continue
    check_type(value, annotation, where)
    return value
