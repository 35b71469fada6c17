"""Loading the device into torch, and what it counts."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from simulated_cuda import build

TOTAL = 141 * 2**30
"""Bytes of memory that each device has, as an H200."""

_library: ctypes.CDLL | None = None
_limits: dict[int, int] = {}


def installed() -> bool:
    """Whether the simulated device is there."""
    return _library is not None


def native() -> ctypes.CDLL:
    """The library of the device, with the functions at the end of `native/simulated_cuda.cpp`."""
    assert _library, "the simulated device is not installed"
    return _library


def install() -> None:
    """Put the device into torch, which must not have been imported; see `build.library` for what it raises."""
    global _library
    if _library is not None:
        return
    if "torch" in sys.modules:
        raise RuntimeError("the simulated device must be installed before torch is imported")
    found = ctypes.CDLL(str(build.library()), mode=ctypes.RTLD_GLOBAL)
    found.sim_counted.restype = ctypes.c_int64
    found.sim_counted.argtypes = [ctypes.c_char_p, ctypes.c_int]
    found.sim_limit.argtypes = [ctypes.c_int, ctypes.c_int64]
    _library = found

    from simulated_cuda import bitsandbytes_on_cpu, flash_attention, torch_cuda, waits

    torch_cuda.fill()
    flash_attention.register()
    bitsandbytes_on_cpu.watch_for_it()
    waits.listen()


def counted(what: str, device: int = 0) -> int:
    """`now`, `peak`, `reserved`, `reserved_peak`, bytes of a device; `launches`, `syncs`, `copies` since the start."""
    return int(native().sim_counted(what.encode(), device))


def reset_peak(device: int = 0) -> None:
    """Peaks begin anew from what is there now."""
    native().sim_reset_peak(device)


@contextmanager
def memory_limit(size: int, device: int = 0) -> Iterator[None]:
    """Within it the device has so many bytes; what does not fit raises torch.OutOfMemoryError."""
    native().sim_limit(device, size)
    _limits[device] = size
    try:
        yield
    finally:
        native().sim_limit(device, -1)
        del _limits[device]


def free_and_total(device: int) -> tuple[int, int]:
    """Bytes of a device, as the driver tells them: what the caching allocator keeps is not free."""
    total = _limits.get(device, TOTAL)
    return max(0, total - max(counted("reserved", device), counted("now", device))), total


@contextmanager
def uncounted() -> Iterator[None]:
    """Within it, nothing that this thread does is counted: for what stands for one kernel."""
    native().sim_quiet(1)
    try:
        yield
    finally:
        native().sim_quiet(-1)
