"""Calls the observer hooks of a run: an observer that raises is set aside, and training goes on."""

import warnings
from collections.abc import Iterable

import pluggy

from tunekit.core import hookspecs
from tunekit.core.hookspecs import PROJECT
from tunekit.core.plugin import check_hooks
from tunekit.core.registry import Registry
from tunekit.errors import PluginError, PluginWarning


class Observers:
    """The observers of one run: those of the installed plugins, and objects given for this run only.

    Args:
        registry: its loaded plugin modules observe every run.
        extra: objects with hook methods (`@tunekit.hookimpl`), for this run.
    """

    def __init__(self, registry: Registry, extra: Iterable[object] = ()) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        for name, module in registry.modules().items():
            self._manager.register(module, name)
        for observer in extra:
            self.add(observer)

    def add(self, observer: object) -> None:
        """Have one more object with hook methods observe the run; PluginError for one that cannot."""
        try:
            self._manager.register(observer)
        except pluggy.PluginValidationError as error:
            raise PluginError(f"an observer asks for what its hook does not offer: {error}") from None
        check_hooks(self._manager, observer)

    def emit(self, hook: str, **arguments: object) -> None:
        """Call every implementation of `hook` with the arguments it asks for."""
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            try:
                implementation.function(*(arguments[name] for name in implementation.argnames))
            except Exception as error:  # observers may not stop a run
                self._manager.unregister(implementation.plugin)
                warnings.warn(
                    f"observer {implementation.plugin_name!r} raised in {hook} and is set aside: "
                    f"{type(error).__name__}: {error}",
                    PluginWarning,
                    stacklevel=2,
                )
