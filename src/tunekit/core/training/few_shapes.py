"""Products of few shapes, where each new shape costs memory for good.

For each shape in half precision on the CPU, oneDNN makes kernels and keeps them, of a thousand shapes and products: a
run of steps of ever other lengths grew by up to 1 GB. So there, lengths are filled up to multiples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MULTIPLE = 64
"""Tokens that pass through the model in half precision on a CPU are a multiple of this: at most 63 more of 4,096."""


def multiple_of(dtype: torch.dtype, device: torch.device | str) -> int:
    """What numbers of tokens are filled up to a multiple of where weights are of this dtype and on this device."""
    import torch

    return MULTIPLE if dtype in (torch.bfloat16, torch.float16) and torch.device(device).type == "cpu" else 1


def filled(tokens: Tensor) -> Tensor:
    """`tokens`, shape (tokens, features), with rows of zeros behind them where their number is to be a multiple."""
    from torch.nn.functional import pad

    more = -len(tokens) % multiple_of(tokens.dtype, tokens.device)
    return pad(tokens, (0, 0, 0, more)) if more else tokens
