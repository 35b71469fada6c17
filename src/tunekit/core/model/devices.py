"""Where a model is: on the CPU, or on a CUDA device."""

from __future__ import annotations

import os
import re

from tunekit.errors import ConfigError

VARIABLE = "TUNEKIT_DEVICE"
"""Names the device where `Pipeline.device` leaves it open: what a machine's GPUs are not to be taken for says "cpu"."""


def check(device: str | None, where: str = "Pipeline.device") -> None:
    """Raise ConfigError, naming `where` it was said, for a device that cannot be; imports no torch."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device or "cpu"):
        raise ConfigError(f"must be 'cpu', 'cuda' or 'cuda:1', got {device!r}", where)


def choose(device: str | None, before: str | None = None) -> str:
    """The device to use: the user's, by `device` or by `TUNEKIT_DEVICE`; else what there is.

    That is the kind of the run gone on with, else "cuda" where there is one, else "cpu".

    Args:
        device: what the user asks for.
        before: where a run began that left it open; what is not here is not taken.

    Raises:
        ConfigError: what the user asks for is not there.
    """
    import torch

    there, named = torch.cuda.is_available(), os.environ.get(VARIABLE) or None
    check(named, VARIABLE)
    chosen = device or named or ("cuda" if there and before != "cpu" else "cpu")
    if chosen.startswith("cuda") and not there:
        raise ConfigError(f"{chosen!r} was asked for, but torch sees no CUDA device", "Pipeline.device")
    return chosen


def here(device: str | None) -> str:
    """The device to look at a finished run on: the one it was asked to be made on, or what there is here."""
    import torch

    return choose(None if device and device != "cpu" and not torch.cuda.is_available() else device)
