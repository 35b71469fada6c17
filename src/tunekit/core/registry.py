"""The registry: which plugins are installed, and which component a name stands for.

Nothing is imported with tunekit. A built-in's name is looked up among the built-ins alone; the entry points of group
`tunekit` are loaded, sorted by distribution and name, when another name is looked up, when plugins are listed, and when
a run asks for those who observe it. Each plugin loads in its own `try`, so one that is broken is recorded and reported,
and the others work. One that is disabled by `TUNEKIT_DISABLE_PLUGINS` is recorded and not imported.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import threading
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar

import attrs

from tunekit.core.common import distributions
from tunekit.core.component import Component
from tunekit.core.fields import did_you_mean
from tunekit.core.hookspecs import API, DISTRIBUTION, PROJECT
from tunekit.core.interfaces import interface_of
from tunekit.core.plugin import Offer, Plugin, Plugins, check_component, components_of, is_users
from tunekit.errors import AmbiguousComponent, PluginError, PluginWarning, UnknownComponent

BUILTINS: Mapping[str, str] = {
    "builtin": "tunekit.plugins",
    "progress": "tunekit.plugins.observers.progress",
}
"""The plugin modules that tunekit itself brings, by plugin name."""

ComponentClass = TypeVar("ComponentClass", bound=type[Component])


class Registry:
    """Finds plugins and their components; `tunekit` uses one instance, tests make their own.

    Args:
        builtins: plugin modules loaded before any entry point, by plugin name.
        environment: where `TUNEKIT_DISABLE_PLUGINS` and `TUNEKIT_STRICT_PLUGINS` are read; None means `os.environ`.
    """

    def __init__(self, builtins: Mapping[str, str] = BUILTINS, environment: Mapping[str, str] | None = None) -> None:
        self._builtins = builtins
        self._environment = os.environ if environment is None else environment
        self._lock = threading.RLock()
        self._plugins: list[Plugin] = []
        self._modules: dict[str, ModuleType] = {}
        self._offers: dict[tuple[str, str], list[Offer]] = {}
        self._begun = False
        self._discovered = False

    def plugins(self) -> Plugins:
        """Every installed plugin, built-ins first, with its status."""
        self._discover()
        return Plugins(self._plugins)

    def modules(self) -> Mapping[str, ModuleType]:
        """The modules of the loaded plugins by plugin spelling, for their observer hooks."""
        self._discover()
        return dict(self._modules)

    def names(self, kind: str) -> tuple[str, ...]:
        """The names of all components of a kind, sorted."""
        self._discover()
        return tuple(sorted(name for offered, name in self._offers if offered == kind))

    def find(self, kind: str, name: str) -> type[Component]:
        """The component class that `name` stands for; `distribution/name` picks between plugins.

        Raises:
            UnknownComponent: nobody offers it; suggests near names and names plugins that failed to load.
            AmbiguousComponent: two distributions offer it, and neither is tunekit.
            PluginError: its plugin names a class that is not there or breaks the rules.
        """
        interface_of(kind)
        distribution, _, bare = name.rpartition("/")
        if distribution in ("", DISTRIBUTION) and (own := self._built_in(kind, bare)):
            return own.resolve()
        self._discover()
        offers = self._offers.get((kind, bare), [])
        if distribution:
            offers = [offer for offer in offers if offer.plugin.distribution == distribution]
        if not offers:
            raise UnknownComponent(self._unknown(kind, name))
        if len(offers) > 1:
            spellings = " or ".join(repr(offer.spelling) for offer in offers)
            origins = " and ".join(offer.plugin.origin for offer in offers)
            raise AmbiguousComponent(
                f"{origins} both offer {_article(kind)} named {bare!r}; write {spellings}, or disable one with "
                "TUNEKIT_DISABLE_PLUGINS"
            )
        return offers[0].resolve()

    def register(self, component: ComponentClass) -> ComponentClass:
        """Make a class of the user's own script known by name, so that a saved recipe can be loaded there again.

        Usable as a decorator. Raises PluginError if the class breaks a rule or its name is taken.
        """
        self._discover()
        check_component(component, component.kind, component.name)
        origin = inspect.getmodule(component)
        plugin = Plugin(name=component.name, distribution="local", version=getattr(origin, "__name__", "script"))
        offers = self._offers.get((component.kind, component.name), [])
        # A notebook cell that is run again defines the class anew: the newer one counts.
        others = [offer for offer in offers if offer.plugin.distribution != "local"]
        if others:
            raise PluginError(
                f"{component.__qualname__}: {others[0].plugin.origin} already offers {component.name!r}; "
                "choose another name"
            )
        self._offers[component.kind, component.name] = [Offer(plugin=plugin, component=component)]
        return component

    def spelling(self, component: type[Component]) -> str:
        """How a recipe names this class: its bare name, or `distribution/name` where the bare one means another."""
        own = self._built_in(component.kind, component.name)
        if own and own.is_of(component):
            return component.name
        self._discover()
        offers = self._offers.get((component.kind, component.name), [])
        mine = [offer for offer in offers if offer.is_of(component)]
        if offers and not mine:
            raise PluginError(
                f"{component.__qualname__} is named {component.name!r}, which is the {component.kind} of "
                f"{offers[0].plugin.origin}; give your class another name"
            )
        return component.name if len(offers) <= 1 else mine[0].spelling

    def provenance(self, component: type[Component]) -> dict[str, str]:
        """Which component, distribution and version an artefact was made by."""
        self._discover()
        for offer in self._offers.get((component.kind, component.name), []):
            if offer.is_of(component):
                return {
                    "component": f"{component.kind}/{component.name}",
                    "distribution": offer.plugin.distribution,
                    "version": offer.plugin.version,
                }
        return {
            "component": f"{component.kind}/{component.name}",
            "distribution": "local",
            "version": component.__module__,
        }

    def _built_in(self, kind: str, name: str) -> Offer | None:
        """The built-in of this name, for which no other plugin is imported, but in strict mode, to hear of faults."""
        if self._environment.get("TUNEKIT_STRICT_PLUGINS") == "1":
            self._discover()
        self._begin()
        return next((offer for offer in self._offers.get((kind, name), []) if offer.is_builtin), None)

    def _begin(self) -> None:
        """Load the built-ins."""
        with self._lock:
            if self._begun:
                return
            self._plugins, self._modules, self._offers = [], {}, {}
            version = distributions.version(DISTRIBUTION)
            for name, module in self._builtins.items():
                plugin = Plugin(name=name, distribution=DISTRIBUTION, version=version)
                self._admit(plugin, functools.partial(importlib.import_module, module), name in self._disabled)
            if stranger := _stranger():
                self._set_aside(stranger, None)
            self._begun = True

    def _discover(self) -> None:
        """Load the built-ins and every entry point."""
        with self._lock:
            if self._discovered:
                return
            self._begin()
            self._begun = False  # begun anew after a strict error, so that the second lookup fails like the first
            for found in distributions.offering(PROJECT):
                self._admit_all(found)
            self._begun = self._discovered = True

    def _admit_all(self, found: distributions.Installed) -> None:
        """Load the plugins of one distribution; one whose files are spoilt is set aside as a whole."""
        names = sorted(point.name for point in found.points) or [distributions.UNKNOWN]
        loads = {point.name: point.load for point in found.points}
        for name in names:
            plugin = Plugin(name=name, distribution=found.name, version=found.version)
            disabled = bool({name, found.name, "*"} & self._disabled)
            if found.error and not disabled:
                self._set_aside(attrs.evolve(plugin, status="failed", error=found.error), None)
            else:
                self._admit(plugin, loads.get(name), disabled)

    @property
    def _disabled(self) -> set[str]:
        return _names(self._environment.get("TUNEKIT_DISABLE_PLUGINS", ""))

    def _admit(self, plugin: Plugin, load: Any, disabled: bool) -> None:
        """Load one plugin and record what became of it; its components count only if all of it is in order."""
        if disabled:
            self._plugins.append(attrs.evolve(plugin, status="disabled", error="by TUNEKIT_DISABLE_PLUGINS"))
            return
        try:
            module = load()
            api = getattr(module, "TUNEKIT_API", API)
            if api != API:
                reason = f"written for plugin interface {api}, this tunekit has {API}"
                self._set_aside(attrs.evolve(plugin, status="incompatible", error=reason), None)
                return
            offered = components_of(module)
        except BaseException as error:  # a plugin may do anything at import; the others must live on
            if is_users(error):
                raise
            reason = f"{type(error).__name__}: {error}"
            self._set_aside(attrs.evolve(plugin, status="failed", error=reason), error)
            return
        names = tuple(f"{component.kind}/{component.name}" for component in offered)
        plugin = attrs.evolve(plugin, components=names)
        self._plugins.append(plugin)
        self._modules[f"{plugin.distribution}/{plugin.name}"] = module
        for component in offered:
            offer = Offer(plugin=plugin, component=component)
            self._offers.setdefault((component.kind, component.name), []).append(offer)

    def _set_aside(self, plugin: Plugin, cause: BaseException | None) -> None:
        self._plugins.append(plugin)
        message = f"plugin {plugin.name!r} of {plugin.origin} is {plugin.status}: {plugin.error}"
        if self._environment.get("TUNEKIT_STRICT_PLUGINS") == "1":
            raise PluginError(message) from cause
        warnings.warn(message, PluginWarning, stacklevel=2)

    def _unknown(self, kind: str, name: str) -> str:
        message = f"no {kind} is named {name!r}{did_you_mean(name, self.names(kind))}"
        missing = [p for p in self._plugins if p.status != "loaded"]
        if missing:
            listed = "; ".join(f"{p.name} of {p.origin} ({p.status}: {p.error})" for p in missing)
            message += f". Not loaded: {listed}"
        return f"{message}. A class of your own script is known once it is decorated with @tunekit.register"


def _stranger() -> Plugin | None:
    """The distribution `tunekit`, which is another project, where it brings a package of our import name."""
    found = distributions.bringing(PROJECT, PROJECT)
    if found is None:
        return None
    reason = (
        f"it is another project with the import name {PROJECT}, and replaces files of {DISTRIBUTION}: "
        f"pip uninstall {PROJECT}, then pip install --force-reinstall --no-deps {DISTRIBUTION}"
    )
    return Plugin(name=PROJECT, distribution=PROJECT, version=found.version, status="incompatible", error=reason)


def _names(text: str) -> set[str]:
    return {name.strip() for name in text.split(",") if name.strip()}


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


@functools.cache
def default_registry() -> Registry:
    """The registry that `tunekit` itself uses."""
    return Registry()


def register(component: ComponentClass) -> ComponentClass:
    """Make a component class of your own script known by name, so that a saved recipe can be loaded there again."""
    return default_registry().register(component)
