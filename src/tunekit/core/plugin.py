"""One plugin: what is recorded of it, what it offers, and the rules its module and classes must keep."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
import pluggy

from tunekit.core import hookspecs
from tunekit.core.common.table import table
from tunekit.core.component import Component
from tunekit.core.fields import did_you_mean
from tunekit.core.hookspecs import DISTRIBUTION, PROJECT, Lazy
from tunekit.core.interfaces import INTERFACES, Evaluator, interface_of
from tunekit.errors import PluginError


@attrs.frozen(kw_only=True)
class Plugin:
    """One installed plugin and what became of it.

    Args:
        name: the name of its entry point.
        distribution: the distribution that brings it.
        version: that distribution's version.
        status: "loaded", "disabled" (not imported), "failed" or "incompatible" (with this plugin interface).
        error: why it is not loaded; empty where it is.
        components: its components as "kind/name".
    """

    name: str
    distribution: str
    version: str
    status: Literal["loaded", "disabled", "failed", "incompatible"] = "loaded"
    error: str = ""
    components: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """Distribution and version in one word, as errors say it."""
        return f"{self.distribution} {self.version}"


class Plugins(tuple[Plugin, ...]):
    """The installed plugins; prints as a table."""

    def __str__(self) -> str:
        rows = []
        for plugin in self:
            first, *others = [plugin.error] if plugin.error else plugin.components or [""]
            rows.append([plugin.name, plugin.distribution, plugin.version, plugin.status, first])
            rows.extend(["", "", "", "", component] for component in others)
        return table(["plugin", "distribution", "version", "status", "components or error"], rows)


@attrs.frozen(kw_only=True)
class Offer:
    """A component as offered by one plugin."""

    plugin: Plugin
    component: type[Component] | Lazy

    @property
    def spelling(self) -> str:
        """The name that means this one and no other."""
        return f"{self.plugin.distribution}/{self.component.name}"

    @property
    def is_builtin(self) -> bool:
        """Whether tunekit itself offers it."""
        return self.plugin.distribution == DISTRIBUTION

    def is_of(self, component: type[Component]) -> bool:
        """Whether this offers that very class."""
        if isinstance(self.component, Lazy):
            return self.component.target == f"{component.__module__}:{component.__qualname__}"
        return self.component is component

    def resolve(self) -> type[Component]:
        """The class; PluginError if it is named, but cannot be imported or breaks a rule."""
        lazy = self.component
        if not isinstance(lazy, Lazy):
            return lazy
        module, _, attribute = lazy.target.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except BaseException as error:  # whatever its module does at import, it is to be said whose it is
            if is_users(error):
                raise
            raise PluginError(
                f"plugin {self.plugin.name!r} of {self.plugin.origin} names {lazy.target!r}, "
                f"which cannot be imported: {said(error)}"
            ) from error
        check_component(found, lazy.kind, lazy.name)
        return found  # type: ignore[no-any-return]


def is_users(error: BaseException) -> bool:
    """Whether the user interrupted: everything else that ends an import is the plugin's own, an exit included."""
    return type(error) is KeyboardInterrupt


def said(error: BaseException) -> str:
    """What an error of an import says; its type, too, unless it is one of those that say by themselves what it was."""
    return str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"


def components_of(module: Any) -> Sequence[type[Component] | Lazy]:
    """What the plugin module offers, after all its hooks were checked against the specifications."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(module)
    check_hooks(manager, module)
    offered: list[type[Component] | Lazy] = []
    for returned in manager.hook.tunekit_components():
        for component in returned:
            if isinstance(component, Lazy):
                interface_of(component.kind)
            else:
                check_component(component, getattr(component, "kind", None), getattr(component, "name", None))
            offered.append(component)
    return offered


def check_hooks(manager: pluggy.PluginManager, plugin: object) -> None:
    """Raise PluginError if `plugin` implements a hook that does not exist, wraps one, or forgot to mark one."""
    if inspect.isclass(plugin):
        raise PluginError(f"{plugin.__name__} is a class; an observer is an object, write {plugin.__name__}()")
    known = [name for name in vars(manager.hook) if name.startswith("tunekit_")]
    for caller in manager.get_hookcallers(plugin) or []:
        if not caller.has_spec():
            specified = [name for name in known if getattr(manager.hook, name).has_spec()]
            raise PluginError(f"{caller.name!r} is no hook of tunekit{did_you_mean(caller.name, specified)}")
        if any(impl.plugin is plugin and (impl.wrapper or impl.hookwrapper) for impl in caller.get_hookimpls()):
            raise PluginError(f"{caller.name}: hooks observe; a wrapper is not allowed")
    marked = {caller.name for caller in manager.get_hookcallers(plugin) or []}
    for name in dir(plugin):
        if name.startswith("tunekit_") and name not in marked and inspect.isroutine(getattr(plugin, name)):
            raise PluginError(f"{name} looks like a hook, but is never called: mark it with @tunekit.hookimpl")


def check_component(component: Any, kind: str | None, name: str | None) -> None:
    """Raise PluginError unless `component` is a concrete component class of this kind and name."""
    is_component = inspect.isclass(component) and issubclass(component, tuple(INTERFACES.values()))
    if not is_component:
        raise PluginError(f"{component!r} is no component: it must be a subclass of one of the five interfaces")
    where = f"{component.__module__}.{component.__qualname__}"
    if not issubclass(component, INTERFACES.get(component.kind, ())):
        raise PluginError(f"{where} says that its kind is {component.kind!r}, but its interface is another")
    if component.kind != kind or getattr(component, "name", None) != name or not name:
        raise PluginError(
            f"{where} is {component.kind}/{getattr(component, 'name', '(no name)')}, but is offered as {kind}/{name}"
        )
    if inspect.isabstract(component):
        missing = ", ".join(sorted(component.__abstractmethods__))
        raise PluginError(f"{where} is abstract: it must define {missing}")
    if "__attrs_attrs__" not in vars(component):
        raise PluginError(f"{where} is not an attrs class: decorate it with @attrs.frozen(kw_only=True)")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise PluginError(f"{where}: the name {name!r} must be kebab-case, like 'my-method'")
    if "use" in {field.name for field in attrs.fields(component)}:
        raise PluginError(f"{where}: no field may be called 'use', which names the component in a recipe")
    if issubclass(component, Evaluator) and not isinstance(getattr(component, "better", None), Mapping | property):
        raise PluginError(f"{where} must say in `better` which metrics it returns and which direction is better")
