"""Native code from the Hub: not looked for unless the user asks, though the package that fetches it is installed.

Where `kernels` can be imported, bitsandbytes fetches a library at its own import, and transformers some for the layers
of some models, unasked. Both take it as missing here, by what Python has for that: `None` in `sys.modules`. It is there
for as long as they look, so that whoever imports `kernels` otherwise gets it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PACKAGE = "kernels"
SWITCH = "USE_HUB_KERNELS"
"""The variable of the environment by which transformers is told; set to 1, the user asks."""
BITSANDBYTES = "bitsandbytes.backends.cpu.ops"
"""The logger of what bitsandbytes says where it finds no such library: to install `kernels`."""


def keep_out() -> None:
    """Have transformers take the package as missing from now on; before a model is made, since some fetch it then."""
    if _asked_for() or not _is_installed():
        return
    with _missing():
        # Older ones look when this module is imported, newer ones by this function, which remembers what it found.
        importlib.import_module("transformers.integrations.hub_kernels")
        looks: Any = importlib.import_module("transformers.utils").is_kernels_available
        looks.cache_clear()
        looks()


@contextmanager
def kept_out() -> Iterator[None]:
    """Within it, bitsandbytes can be imported: it takes the package as missing, and says nothing about it."""
    if _asked_for():
        yield
        return
    logger = logging.getLogger(BITSANDBYTES)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with _missing():
            yield
    finally:
        logger.setLevel(level)


def _asked_for() -> bool:
    return os.environ.get(SWITCH, "").upper() in ("1", "ON", "YES", "TRUE")


def _is_installed() -> bool:
    return PACKAGE in sys.modules or importlib.util.find_spec(PACKAGE) is not None


@contextmanager
def _missing() -> Iterator[None]:
    there = {PACKAGE: sys.modules[PACKAGE]} if PACKAGE in sys.modules else {}
    sys.modules[PACKAGE] = None  # type: ignore[assignment]  # as the documentation of `import` has it
    try:
        yield
    finally:
        del sys.modules[PACKAGE]
        sys.modules.update(there)
