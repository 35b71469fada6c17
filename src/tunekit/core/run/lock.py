"""The lock of a run directory: one process writes into it, and one that died does not keep others out.

A file names the process. It is not a lock of the operating system's: those are missing on some network file systems,
and other on Windows.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs

from tunekit.errors import ConfigError, RunExists

LOCK = "run.lock"
ATTEMPTS = 3
"""So often the file is taken from a process that is gone: another process may be doing the same."""
PATIENCE = 1.0
"""Seconds after which a lock that says nothing was left by a process that died before it wrote its name."""


@attrs.frozen(kw_only=True)
class Owner:
    """A process.

    Args:
        host: the name of its machine.
        pid: its number there.
        started: when it began, in seconds since 1970: numbers are given again.
    """

    host: str
    pid: int
    started: float

    def is_gone(self) -> bool:
        """Whether it runs no more. Of another machine's process this cannot be known, so it is taken to run."""
        import psutil

        if self.host != platform.node():
            return False
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return True  # it ended, and its parent has not looked yet
            return bool(abs(process.create_time() - self.started) > 2)  # the clock may be set
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False

    def __str__(self) -> str:
        since = datetime.datetime.fromtimestamp(self.started, datetime.UTC).isoformat(timespec="seconds")
        return f"process {self.pid} on {self.host}, running since {since}"


@contextmanager
def held(directory: Path) -> Iterator[str]:
    """Keep other processes out of `directory`; yields a note if the lock was taken from a process that is gone.

    Raises:
        RunExists: another process has it, or this one; host and number are named.
        ConfigError: the lock cannot be written.
    """
    place = directory / LOCK
    text = json.dumps(attrs.asdict(_this_process()))
    gone = _take(place, text)
    try:
        yield gone
    finally:
        if _read(place) == text:
            place.unlink(missing_ok=True)


def leave(directory: Path, host: str, pid: int) -> None:
    """Take away the lock of a process that is known to be gone: of another machine's, nobody else can know."""
    place = directory / LOCK
    owner = _owner(_read(place))
    if owner and (owner.host, owner.pid) == (host, pid):
        place.unlink(missing_ok=True)


def _take(place: Path, text: str) -> str:
    """Make the lock file; says whose lock it replaced, if any."""
    note = ""
    for _ in range(ATTEMPTS):
        try:
            # Exclusive: of two processes one makes the file.
            with place.open("x", encoding="utf-8") as file:
                file.write(text)
            return note
        except FileExistsError:
            note = _clear(place)
        except OSError as error:
            raise ConfigError(f"cannot write {place}: {error.strerror}", "directory") from None
    raise RunExists(f"{place.parent} is being taken by other processes; choose another directory")


def _clear(place: Path) -> str:
    """Take away the lock of a process that is gone, and say whose it was; RunExists if it is not gone."""
    text = _read(place)
    patience = time.monotonic() + PATIENCE
    while not text and place.exists() and time.monotonic() < patience:
        time.sleep(0.05)
        text = _read(place)
    owner = _owner(text)
    if owner and not owner.is_gone():
        here = "" if owner.host == platform.node() else f" If it runs no more, delete {place}."
        raise RunExists(f"{place.parent} is in use by {owner}.{here} Choose another directory, or wait for its end")
    # Renamed before it is deleted: of two processes that come here, only one takes this very file away.
    aside = place.with_name(f".{LOCK}.{os.getpid()}")
    try:
        place.replace(aside)
    except FileNotFoundError:
        return ""
    if _read(aside) != text:
        aside.replace(place)  # another process was quicker, and this was its new lock
        return ""
    aside.unlink(missing_ok=True)
    return f"took over the lock of {owner or 'a process'} that is gone"


def _this_process() -> Owner:
    import psutil

    return Owner(host=platform.node(), pid=os.getpid(), started=psutil.Process().create_time())


def _owner(text: str) -> Owner | None:
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _read(place: Path) -> str:
    try:
        return place.read_text(encoding="utf-8")
    except OSError:
        return ""
