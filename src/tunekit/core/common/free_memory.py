"""How much memory is free, for what may be kept but need not be."""

from __future__ import annotations

from pathlib import Path

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where Linux says what a container may use, of which the machine's free memory says nothing."""


def free_bytes(device: str) -> int:
    """Bytes that `device` ("cpu", "cuda", "cuda:1") has free now; 0 for a device that does not say."""
    import psutil

    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    if device != "cpu":
        return 0
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((CONTROL_GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
    except (OSError, ValueError):  # no control group of the second version
        return free
