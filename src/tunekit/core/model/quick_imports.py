"""Importing bitsandbytes, as PEFT does wherever it is installed, without torch's compiler and code from the Hub."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tunekit.core.model.hub_kernels import kept_out


def import_bitsandbytes() -> None:
    """Import bitsandbytes, if it is installed, before whoever imports it otherwise.

    It compiles two of its functions at import, for which torch loads its compiler: 2 of the 7 seconds in which torch,
    transformers and PEFT are there. Imported here, it compiles them when they are called. It looks for native code on
    the Hub, too, which here it does not.
    """
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    with _compiled_when_called(), kept_out():
        importlib.import_module("bitsandbytes")


@contextmanager
def _compiled_when_called() -> Iterator[None]:
    """Within it, what is given to `torch.compile` is compiled at its first call."""
    import torch

    at_once = torch.compile

    def later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:  # a decorator with options
            return lambda decorated: later(decorated, **options)
        compiled: list[Callable[..., Any]] = []

        def call(*args: Any, **named: Any) -> Any:
            if not compiled:
                compiled.append(at_once(function, **options))
            return compiled[0](*args, **named)

        return call

    torch.compile = later
    try:
        yield
    finally:
        torch.compile = at_once
