"""The types of component fields: checked strictly and alike for Python and for recipes, with the field in the error."""

import difflib
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import attrs

from tunekit.errors import ConfigError, PluginError

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def at_least(minimum: float) -> Validator:
    """Validator: a number field must not be below `minimum` (None, where the field allows it, passes)."""

    def check(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if _is_number(value) and not value >= minimum:
            raise ConfigError(f"must be at least {minimum}, got {value!r}", _where(instance, attribute))

    return check


def between(low: float, high: float) -> Validator:
    """Validator: a number field must lie in the half-open interval [`low`, `high`)."""

    def check(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if _is_number(value) and not low <= value < high:
            raise ConfigError(f"must be in [{low}, {high}), got {value!r}", _where(instance, attribute))

    return check


def positive(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
    """Validator: a number field must be above zero (None, where the field allows it, passes)."""
    if _is_number(value) and not value > 0:
        raise ConfigError(f"must be above 0, got {value!r}", _where(instance, attribute))


def as_text(value: Any) -> Any:
    """Converter: a path as text; anything else as it is, for the type check to judge."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def as_tuple(value: Any) -> Any:
    """Converter: a list as a tuple; anything else as it is, for the type check to judge."""
    return tuple(value) if isinstance(value, list) else value


def types_of(cls: type) -> dict[str, Any]:
    """The type of every field of an attrs class, by name; strings resolved."""
    if "__attrs_types_resolved__" not in vars(cls):
        try:
            attrs.resolve_types(cls)
        except NameError as error:
            raise PluginError(
                f"{cls.__module__}.{cls.__qualname__}: the annotation of a field cannot be resolved at run time "
                f"({error}); import its type at the top of the module, and use only the standard library's, "
                "attrs' and tunekit's types for fields"
            ) from None
    return {field.name: field.type for field in attrs.fields(cls)}


def check_types(instance: Any) -> None:
    """Raise ConfigError for the first field of `instance` whose value is not of its annotated type."""
    for name, annotation in types_of(type(instance)).items():
        check_type(getattr(instance, name), annotation, f"{type(instance).__name__}.{name}")


def check_type(value: Any, annotation: Any, where: str) -> None:
    """Raise ConfigError, naming `where`, unless `value` is of type `annotation`: no "8" for 8, no 1 for True."""
    if not matches(value, annotation):
        hint = ""
        options = typing.get_args(annotation) if is_union(annotation) else (annotation,)
        if isinstance(value, list) and any(typing.get_origin(option) is tuple for option in options):
            hint = "; write a tuple"
        if isinstance(value, type) and isinstance(annotation, type) and issubclass(value, annotation):
            hint = f"; that is the class, write {value.__name__}(...)"
        raise ConfigError(f"expected {describe(annotation)}, got {_show(value)}{hint}", where)


def matches(value: Any, annotation: Any) -> bool:
    """Whether `value` is of type `annotation` (an int is a float; a bool is no number)."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or annotation is None:
        return annotation is Any or value is None
    if is_union(annotation):
        return any(matches(value, option) for option in arguments)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(matches(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(matches, value, arguments))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            matches(key, arguments[0]) and matches(item, arguments[1]) for key, item in value.items()
        )
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or annotation)


def describe(annotation: Any) -> str:
    """A type as a person would say it: `int or None`, `'linear' or 'cosine'`, `tuple of str`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is type(None):
        return "None"
    if is_union(annotation):
        return " or ".join(describe(option) for option in arguments)
    if origin is Literal:
        return " or ".join(repr(option) for option in arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"tuple of {describe(arguments[0])}"
    if isinstance(annotation, type) and origin is None:
        return annotation.__name__
    return str(annotation).replace("collections.abc.", "").replace("typing.", "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A suggestion to append to an error: "; did you mean 'rank'?", or what there is to choose from."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def is_union(annotation: Any) -> bool:
    """Whether a type is a choice of types, written with `|` or Union."""
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _where(instance: Any, attribute: "attrs.Attribute[Any]") -> str:
    return f"{type(instance).__name__}.{attribute.name}"


def _show(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
