"""Checks of every component: a frozen, documented, light configuration that survives a recipe and a pickle."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs

from tunekit.core import recipe
from tunekit.core.component import Component
from tunekit.core.fields import matches, types_of
from tunekit.core.interfaces import interface_of
from tunekit.core.registry import Registry, default_registry
from tunekit.errors import ConfigError, PluginError
from tunekit.testing.harness import Harness


def is_frozen(component: Component, harness: Harness) -> None:
    """Its fields cannot be changed, nor can their values."""
    cls = type(component)
    assert "__attrs_attrs__" in vars(cls), (
        f"decorate {cls.__name__} itself with @attrs.frozen(kw_only=True): without it, its annotations are no fields"
    )
    for name in (*_values(component), "an_attribute_of_no_field"):
        try:
            setattr(component, name, getattr(component, name, None))
        except AttributeError:  # attrs' FrozenInstanceError among them
            continue
        raise AssertionError(f"{cls.__name__}.{name} can be set: decorate the class with @attrs.frozen(kw_only=True)")
    for name, value in _values(component).items():
        assert not isinstance(value, list | set | bytearray), (
            f"{cls.__name__}.{name} is a {type(value).__name__}, which can be changed afterwards: annotate a tuple or "
            "a frozenset, with a converter if a list is to be accepted"
        )


def is_keyword_only(component: Component, harness: Harness) -> None:
    """Its fields are given by name, so that more of them can come in any order."""
    cls = type(component)
    positional = [field.name for field in attrs.fields(cls) if not field.kw_only]
    assert not positional, f"{cls.__name__} takes {positional} by position: decorate it with (kw_only=True)"


def is_named(component: Component, harness: Harness) -> None:
    """Its name is kebab-case and no other component's."""
    cls = type(component)
    name = getattr(cls, "name", None)
    assert isinstance(name, str), f'give {cls.__name__} a name: name = "my-name", a ClassVar'
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name), (
        f"{cls.__name__}.name is {name!r}: write it in kebab-case, such as {_kebab(cls.__name__)!r}"
    )
    assert isinstance(component, interface_of(cls.kind)), f"{cls.__name__}.kind is set by its interface: do not set it"
    assert isinstance(cls.requires, tuple), f"{cls.__name__}.requires must be a tuple: ('bitsandbytes',)"
    try:
        default_registry().spelling(cls)
    except PluginError as error:
        raise AssertionError(str(error)) from None


def is_documented(component: Component, harness: Harness) -> None:
    """The class says what it is, and its `Args:` say what each field is."""
    cls = type(component)
    assert vars(cls).get("__doc__"), f"give {cls.__name__} a docstring: what it does, and where it comes from"
    # A field that is inherited is documented where it is defined.
    described = {name for base in cls.__mro__ for name in _described(vars(base).get("__doc__") or "")}
    missing = [name for name in _values(component) if name not in described]
    assert not missing, f"describe {missing} in the docstring of {cls.__name__}, under `Args:`, as `{missing[0]}: ...`"


def survives_a_recipe(component: Component, harness: Harness) -> None:
    """It comes back equal from a dict and from TOML."""
    import tomli_w

    registry = _registry_with(type(component))
    table = recipe.to_table(component, registry)
    for made, form in (
        (json.loads(json.dumps(table)), "a dict"),
        (tomllib.loads(tomli_w.dumps(table)), "TOML"),
    ):
        found = recipe.from_table(made, type(component), registry)
        assert found == component, (
            f"after a round trip through {form} it is {found!r}, and was {component!r}: use fields of plain types "
            "(bool, int, float, str, tuples and mappings of these, components), without converters that lose something"
        )


def refuses_unknown_fields(component: Component, harness: Harness) -> None:
    """A field that it does not have is a ConfigError that names the field."""
    registry = _registry_with(type(component))
    table = {**recipe.to_table(component, registry), "no_such_field": 1}
    said = None
    try:
        recipe.from_table(table, type(component), registry)
    except ConfigError as error:
        said = str(error)
    assert said is not None, "a recipe with the unknown field 'no_such_field' was accepted: take no **kwargs"
    assert "no_such_field" in said, f"the error must name the field, got: {said}"
    try:
        attrs.evolve(component, no_such_field=1)  # type: ignore[call-arg]
    except TypeError:
        return
    raise AssertionError("made with the unknown argument no_such_field=1 it raises nothing: take no **kwargs")


def defaults_to_none_where_it_may_be_none(component: Component, harness: Harness) -> None:
    """TOML has no null: None is written by leaving the field out, and must be what is read then."""
    types = types_of(type(component))
    for field in attrs.fields(type(component)):
        if matches(None, types[field.name]):
            assert field.default is None, (
                f"{type(component).__name__}.{field.name} may be None, so None must be its default: a recipe says None "
                "by leaving the field out"
            )


def survives_copies(component: Component, harness: Harness) -> None:
    """It is equal to its copies, however they are made."""
    cls = type(component)
    try:
        pickled = pickle.loads(pickle.dumps(component))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(
            f"{cls.__name__} cannot be pickled ({error}): define it at the top of a module, and keep functions and "
            "open files out of its fields"
        ) from None
    for copied, how in ((pickled, "pickle"), (copy.deepcopy(component), "copy"), (attrs.evolve(component), "evolve")):
        assert copied == component, f"its {how} is not equal to it: {copied!r}; do not set eq=False, nor write __eq__"


@contextmanager
def unchanged(component: Component) -> Iterator[None]:
    """What happens inside must leave the component as it was: it may be used for several runs."""
    before = copy.deepcopy((_values(component), vars(component) if hasattr(component, "__dict__") else {}))
    yield
    after = (_values(component), vars(component) if hasattr(component, "__dict__") else {})
    assert after == before, (
        f"using {type(component).__name__} changed it: keep what belongs to one run in the model or in a local variable"
    )


def _values(component: Component) -> dict[str, Any]:
    return {field.name: getattr(component, field.name) for field in attrs.fields(type(component))}


def _kebab(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()


def _described(docstring: str) -> list[str]:
    """The names that the `Args:` section of a docstring describes."""
    _, _, rest = inspect.cleandoc(docstring).partition("\nArgs:\n")
    section = re.match(r"(?:[ ]+.*\n?|\n)*", rest)
    return re.findall(r"^ +(\w+): \S", section.group(), re.MULTILINE) if section else []


def _registry_with(cls: type[Component]) -> Registry:
    """The registry that knows `cls`: tunekit's, or a new one for a class that is not registered."""
    registry = default_registry()
    if cls.name not in registry.names(cls.kind):
        registry = Registry()
        registry.register(cls)
    return registry


CHECKS = (
    is_frozen,
    is_keyword_only,
    is_named,
    is_documented,
    survives_a_recipe,
    refuses_unknown_fields,
    defaults_to_none_where_it_may_be_none,
    survives_copies,
)
