"""Every error that tunekit raises on purpose. All derive from `TunekitError`."""


class TunekitError(Exception):
    """Root of all errors raised by tunekit: catch this one to catch them all."""


class ConfigError(TunekitError, ValueError):
    """A field or a combination of components that cannot work; says which field, and what to write instead.

    Args:
        message: what is wrong and what to do.
        where: the field it concerns, as a dotted path (`LoRA.rank`, `recipe.adapter.rank`), or nothing.
    """

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.message = message
        self.where = where


class DataError(TunekitError, ValueError):
    """A row or a file that cannot be trained on; says where (file:line) and why."""


class LeftOut(DataError):
    """A row that a source was told to leave out: counted like a bad row, and never a reason to stop."""


class UnknownComponent(TunekitError, LookupError):
    """No installed plugin offers a component of this name."""


class AmbiguousComponent(TunekitError, LookupError):
    """Two installed distributions offer a component of this name; `distribution/name` picks one."""


class PluginError(TunekitError):
    """A plugin could not be loaded or broke the rules of the plugin interface."""


class NotSupported(TunekitError):
    """The component does not offer this operation; says what does."""


class RunExists(TunekitError, FileExistsError):
    """The run directory is taken; says how to resume it."""


class TrainingError(TunekitError, RuntimeError):
    """Training went wrong in a way that would have produced a silently bad result."""


class ExportError(TunekitError, RuntimeError):
    """What was written is not the model that was merged; says what differs. Nothing of it is left."""


class PluginWarning(UserWarning):
    """A plugin was set aside (it failed, is incompatible, or an observer of it raised); the rest goes on."""
