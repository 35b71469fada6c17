"""Which line made the host wait for the device, and how many operators reached it."""

import ctypes
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from simulated_cuda.device import native

ELSEWHERE = (
    "/torch/",
    "/simulated_cuda/waits.py",
    "/simulated_cuda/torch_cuda.py",
    "/contextlib.py",
    "/_pytest/",
    "/pluggy/",
    "/threading.py",
    "/concurrent/",
)
"""Parts of paths of files whose lines are not those looked for."""
WARN = 1
"""`torch.cuda.set_sync_debug_mode("warn")`; "error" is done in C++."""


class Counts:
    """What was counted.

    Args:
        wants_launches: whether launches are, too.

    Attributes:
        waits: how often the host waited, by what made it wait and the lines of Python that asked for it.
        staged: the same for copies of memory that is not pinned: no wait for the device, but one for the driver.
        launches: operators that reached the device, by name.
    """

    def __init__(self, wants_launches: bool) -> None:
        self.wants_launches = wants_launches
        self.waits: Counter[tuple[str, str]] = Counter()
        self.staged: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[str] = Counter()

    def report(self, most: int = 40) -> str:
        """The most frequent of each, one a line."""
        lines = [f"{self.waits.total()} waits of the host, {self.launches.total()} launches"]
        lines += [f"  {count:6d}  wait: {name:45s} {where}" for (name, where), count in self.waits.most_common(most)]
        lines += [f"  {count:6d}  staged: {name:43s} {where}" for (name, where), count in self.staged.most_common(most)]
        lines += [f"  {count:6d}  launch: {name}" for name, count in self.launches.most_common(most)]
        return "\n".join(lines)


_counting: list[Counts] = []


@contextmanager
def counting(launches: bool = False) -> Iterator[Counts]:
    """Within it, waits are counted by the line that makes them, and launches by operator if asked for, which is slow."""
    counts = Counts(launches)
    _counting.append(counts)
    if launches:
        native().sim_on_launch(_tell)
    try:
        yield counts
    finally:
        _counting.remove(counts)
        if not any(each.wants_launches for each in _counting):
            native().sim_on_launch(ctypes.cast(None, type(_tell)))


def listen() -> None:
    """Be told of waits, from now on."""
    native().sim_on_sync(_tell)


def place() -> str:
    """The innermost three lines that asked, the innermost first: those of tunekit, else of whoever is not torch."""
    frames = [frame for frame in traceback.extract_stack() if not any(part in frame.filename for part in ELSEWHERE)]
    frames = [frame for frame in frames if "/tunekit/" in frame.filename] or frames
    shown = [f"{'/'.join(Path(one.filename).parts[-3:])}:{one.lineno} {one.name}" for one in reversed(frames[-3:])]
    return " < ".join(shown) or f"(no Python: {threading.current_thread().name})"


@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)
def _tell(kind: bytes, name: bytes) -> None:
    """Called by the device, in whichever thread it is: of a "launch", a "sync" or something "staged"."""
    said = name.decode()
    if kind == b"launch":
        for counts in _counting:
            if counts.wants_launches:
                counts.launches[said] += 1
        return
    if kind == b"sync" and native().sim_get_sync_mode() == WARN:
        warnings.warn("called a synchronizing CUDA operation (simulated)", UserWarning, stacklevel=2)
    where = place() if _counting else ""
    for counts in _counting:
        (counts.waits if kind == b"sync" else counts.staged)[said, where] += 1
