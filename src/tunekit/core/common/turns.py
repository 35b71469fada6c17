"""One thread of a process works with models at a time: the others wait for their turn.

What a run changes while it goes on is the process's and not the thread's. transformers sets torch's default dtype while
it makes a model, and replaces torch's initializers; a run seeds the random number generators, draws from them, and puts
them back. Of two at once, each would have the other's: other numbers, or a model of which weights are missing.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import attrs

from tunekit.core.common import distributions
from tunekit.errors import ConfigError

PATIENCE = 10.0
"""Seconds after which a thread that waits says for what: it may be something that waits for this very thread."""


class Checked(Protocol):
    """What can be checked before it works with models."""

    def check(self) -> None:
        """Raise an error for what cannot work."""


C = TypeVar("C", bound=Checked)
P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)


@attrs.define(eq=False)
class Turns:
    """Whose turn it is in one process."""

    lock: threading.RLock = attrs.field(factory=threading.RLock)
    doing: list[str] = attrs.field(factory=list)
    threads: set[int] = attrs.field(factory=set)
    notes: list[str] = attrs.field(factory=list)

    def take(self, what: str) -> None:
        """Wait for the turn, which a thread that has it has again at once."""
        if not self.lock.acquire(blocking=False):
            began, other = time.monotonic(), self._other
            if not self.lock.acquire(timeout=PATIENCE):
                logger.warning("%s waits until another thread of this process is done with %s", what, self._other)
                self.lock.acquire()
            seconds = time.monotonic() - began
            self.notes = [f"waited {seconds:.1f} s for {other} in another thread: one at a time works with models"]
        elif not self.doing:
            self.notes = []
        self.doing.append(what)

    def give_back(self) -> None:
        """Let the next one have it."""
        self.doing.pop()
        self.lock.release()

    @property
    def _other(self) -> str:
        return next(iter(self.doing), "its turn")


_TURNS: dict[int, Turns] = {}
"""By process id: a child that was forked while a thread had its turn does not wait for a thread that it has not."""


def notes() -> list[str]:
    """What is to be noted of the turn that this thread has, such as that it was waited for."""
    return list(_turns().notes)


@contextmanager
def turn(what: str) -> Iterator[None]:
    """Within it, no other thread of this process is within it; `what` is to be done there, for those who wait.

    Raises ConfigError, naming the distribution, where torch cannot be imported because its files are spoilt.
    """
    turns = _turns()
    turns.take(what)
    try:
        _settle_threads(turns)
        yield
    except Exception as error:
        if spoilt := _spoilt(error):
            raise ConfigError(
                f"torch cannot be imported, which reads the entry points of all packages: {spoilt}. "
                "Install it again, or uninstall it",
                "installed packages",
            ) from error
        raise
    finally:
        turns.give_back()


def alone(method: Callable[Concatenate[C, P], T]) -> Callable[Concatenate[C, P], T]:
    """A method that has the turn while it works, after what it belongs to was checked: that waits for nobody."""

    @wraps(method)
    def call(self: C, /, *args: P.args, **kwargs: P.kwargs) -> T:
        self.check()
        with turn(f"{type(self).__name__}.{method.__name__.strip('_')}"):
            return method(self, *args, **kwargs)

    return call


def _turns() -> Turns:
    return _TURNS.setdefault(os.getpid(), Turns())


def _settle_threads(turns: Turns) -> None:
    """Have torch compute with threads that there are: a fork leaves a child without those of its parent.

    OpenMP waits for them for ever, in the thread that used them before the fork; so that one computes alone.
    torch makes a pool of its own anew, if it had one, in the first thread of the child that computes; where that are
    several at once, as when transformers loads, they break it ("Invalid thread pool!"). So one thread asks for it
    before, and a new one, since a thread asks only once. Where there is nothing to be made, nothing changes.
    """
    import torch

    here = threading.get_ident()
    if here not in turns.threads:
        turns.threads.add(here)
        forked = any(here in parent.threads for parent in _TURNS.values() if parent is not turns)
        if forked and torch.get_num_threads() > 1:
            torch.set_num_threads(1)
            note = "computes with one thread: those of the process that this one was forked from are not here; spawn it"
            turns.notes.append(note)
            logger.warning("%s %s", turns.doing[0], note)
    asks = threading.Thread(target=torch.get_num_threads, name="tunekit-threads")
    asks.start()
    asks.join()


def _spoilt(error: Exception) -> str:
    """Which distributions are spoilt, if that is what an error is about: it was raised while they were read."""
    found, at = [], error.__traceback__
    while at:
        found.append(at.tb_frame.f_globals.get("__name__", ""))
        at = at.tb_next
    if isinstance(error, ConfigError) or importlib.metadata.__name__ not in found:
        return ""
    return "; ".join(f"{one.name} {one.version}: {one.error}" for one in distributions.unreadable())
