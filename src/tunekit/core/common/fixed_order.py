"""Sums on a GPU in a fixed order, so that the same computation gives the same bits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def in_fixed_order(device: str) -> Iterator[None]:
    """Within it, a GPU adds up in the same order each time, as far as it can; afterwards as before.

    The backward pass of flash attention does not otherwise, so that a run is not the same to the bit twice.
    """
    import torch

    if not device.startswith("cuda"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
