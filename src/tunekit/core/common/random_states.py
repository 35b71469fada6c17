"""The random number generators that training draws from, all together: seeded, read, restored."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def seed_everything(seed: int) -> None:
    """Begin anew in python, numpy, torch and CUDA, as `transformers.set_seed` does.

    That one imports PEFT for it, which takes seconds that a run without adapters need not wait.
    """
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_states(device: str | None = None) -> dict[str, Any]:
    """The state of every random number generator that training may draw from.

    Of those of GPUs, the state of `device` alone where it is named: so it may be restored where there are others. None
    for all that are seen.
    """
    import numpy as np
    import torch

    numbers = np.random.get_state(legacy=False)
    return {
        "python": list(random.getstate()),
        "numpy": {**numbers, "state": {**numbers["state"], "key": numbers["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(gpu) for gpu in _gpus(device)],
    }


def set_random_states(states: Mapping[str, Any], device: str | None = None) -> None:
    """Restore what `random_states` returned, of a GPU into `device` where it is named."""
    import numpy as np
    import torch

    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    for gpu, state in zip(_gpus(device), states["cuda"], strict=False):  # what was kept on a CPU has none
        torch.cuda.set_rng_state(state, gpu)


def _gpus(device: str | None) -> list[str]:
    """The GPUs whose generators are meant."""
    import torch

    if device is None:
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [device] if device.startswith("cuda") and torch.cuda.is_available() else []


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Whatever is drawn or seeded within it, afterwards all states are those of before."""
    before = random_states()
    try:
        yield
    finally:
        set_random_states(before)
