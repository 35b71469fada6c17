"""A base in plain float32 to be merged into, where there is room for it: on its device, else on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunekit.core.common.free_memory import free_bytes
from tunekit.core.interfaces import Quantizer
from tunekit.core.model.dequantize import dequantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOM = 1.5
"""How much must be free, in float32 weights of the model: one for them, and what they are made from (packed weights are
at most a quarter, a layer at a time is there twice), an adapter and the logits of a few rows."""


def where(numbers: int, device: str) -> str:
    """Where a model of so many numbers is merged and compared: `device` if it has room for it in float32, else "cpu".

    A step over a base in half precision or packed takes less than the base does in float32, so a device that a model
    was trained on need not have the room.
    """
    if not device.startswith("cuda"):
        return device
    import torch

    torch.cuda.empty_cache()  # what the allocator keeps of a training counts as taken
    return device if free_bytes(device) >= ROOM * 4 * numbers else "cpu"


def plain(model: PreTrainedModel, quantizer: Quantizer | None, device: str) -> PreTrainedModel:
    """`model` itself in float32 on `device`, with the very weights that quantized layers stand for.

    Args:
        model: a base without an adapter, changed in place.
        quantizer: what quantized it; None for a plain one.
        device: where to; a layer at a time is dequantized where it is.
    """
    if quantizer:
        return dequantize(model, quantizer, device)
    return model.to(device).float()
