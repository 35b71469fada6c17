"""How much memory there is, and whether something fits."""

from __future__ import annotations

from collections.abc import Mapping

from tunekit.core.common.free_memory import free_bytes
from tunekit.errors import ConfigError

STANDING = ("frozen weights", "quantization state", "trained weights", "gradients", "optimizer", "dequantized weights")
"""The parts that are known to the byte."""
SHARE = 0.1
"""What is added to the other parts before they count as fitting: so far a prediction may be off."""


class DoesNotFitError(ConfigError):
    """Nothing that may be chosen keeps a step within the memory that the user allows."""


def available(device: str) -> int:
    """Bytes that this process may still take on `device`: on CUDA what torch holds and does not use among them."""
    if not device.startswith("cuda"):
        return free_bytes(device)
    import torch

    return free_bytes(device) + int(torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def fits(parts: Mapping[str, int], budget: int) -> bool:
    """Whether the parts of a step fit into so many bytes, with room for the error of a prediction."""
    return with_room(parts) <= budget


def with_room(parts: Mapping[str, int]) -> float:
    """Bytes of the parts of a step, and room for the error of a prediction."""
    return sum(size * (1 if part in STANDING else 1 + SHARE) for part, size in parts.items())


def in_words(parts: Mapping[str, int]) -> str:
    """The parts, largest first."""
    by_size = sorted(parts.items(), key=lambda item: item[1], reverse=True)
    return ", ".join(f"{part} {gibibytes(size)}" for part, size in by_size if size)


def gibibytes(size: int) -> str:
    """A size to be read."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
