"""What LoHa and LoKr of PEFT draw at random while training.

Only ever imported from inside of methods, since it imports torch.
"""

from typing import Any

import torch
from torch import Tensor


def drops_rows_alone(layer: Any, adapter: str) -> bool:
    """Whether the layer drops rows of its update at most, and never all of it."""
    return not layer.module_dropout[adapter]


def kept_rows(layer: Any, adapter: str, x: Tensor, scaled: bool) -> Tensor | None:
    """A factor for each row of the update, (out_features): 0 for one that is dropped; None where none is.

    Args:
        layer: PEFT's.
        adapter: its name.
        x: what says dtype and device.
        scaled: whether the other rows grow, so that the mean stays.
    """
    if not layer.training:
        return None
    torch.rand(1)  # PEFT draws whether to drop the whole update, also where that never is
    share = layer.rank_dropout[adapter]
    if not share:
        return None
    kept = (torch.rand(layer.out_features) > share).to(x.device, torch.promote_types(x.dtype, torch.float32))
    return (kept / kept.mean() if scaled else kept).to(x.dtype)
