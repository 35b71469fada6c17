"""SIGINT and SIGTERM in the middle of a step: it is finished, a checkpoint is written, and then the run stops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import attrs

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@attrs.define
class Asked:
    """Whether the run was asked to stop.

    Args:
        by: the signal that asked; None while none has.
    """

    by: signal.Signals | None = None

    def leave(self) -> None:
        """Stop as was asked, if it was: KeyboardInterrupt for SIGINT, SystemExit(143) for SIGTERM."""
        if self.by is signal.SIGINT:
            raise KeyboardInterrupt
        if self.by:
            raise SystemExit(128 + self.by)


@contextmanager
def asked_to_stop() -> Iterator[Asked]:
    """Within it, a first SIGINT or SIGTERM is noted and no more; a second does what it would do otherwise.

    So a second one stops at once: that of a terminal or a notebook raises KeyboardInterrupt, SIGTERM ends the process.
    Outside of the main thread, where Python allows no handlers, nothing is changed.
    """
    asked = Asked()
    former = {}
    if threading.current_thread() is threading.main_thread():
        former = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in former.items():
            # None: somebody's handler that is not Python's. It was never replaced.
            if handler is not None and signal.getsignal(number) is note:
                signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        asked.by = signal.Signals(number)
        restore()
        # Not by print: the signal may have come in the middle of one.
        text = f"\n{asked.by.name}: finishing this step, then a checkpoint. Once more stops at once.\n"
        with suppress(OSError):  # nobody listens
            os.write(2, text.encode())

    for number, handler in former.items():
        # A signal that is ignored (nohup, a background job) stays so.
        if handler not in (None, signal.SIG_IGN):
            signal.signal(number, note)
    try:
        yield asked
    finally:
        restore()
