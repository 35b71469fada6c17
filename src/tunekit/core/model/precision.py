"""In which dtype the base's weights are held, and why.

A frozen weight is only multiplied with, so half the bits serve as well where the hardware multiplies them quickly: half
the memory, and up to twice or more the speed. It is loaded in that dtype once, and never cast again. What is trained
is float32 in any case, whatever it adapts: a step is smaller than the distance of two bfloat16 numbers.
"""

from __future__ import annotations

import os

import attrs

from tunekit.core.interfaces import AdapterMethod
from tunekit.errors import ConfigError

VARIABLE = "TUNEKIT_CPU_DTYPE"
"""Names the dtype of frozen weights on the CPU, where `Pipeline.dtype` does not: the same on unlike processors."""


@attrs.frozen
class Precision:
    """A dtype of weights.

    Args:
        dtype: torch's name of it.
        reason: why it was chosen.
        smaller: what is taken instead where it does not fit into the memory that the user allows; None for nothing.
    """

    dtype: str
    reason: str
    smaller: str | None = None

    def __str__(self) -> str:
        return f"{self.dtype}: {self.reason}"


def check_dtype(dtype: str | None, device: str | None) -> None:
    """Raise ConfigError for a dtype that cannot be, asked for here or by `TUNEKIT_CPU_DTYPE`; imports no torch.

    float16 cannot on the CPU, which has no arithmetic for it to train with.
    """
    _named()
    if dtype == "float16" and device == "cpu":
        raise ConfigError("float16 does not train on the CPU; use float32 or bfloat16", "Pipeline.dtype")


def choose_precision(dtype: str | None, device: str, method: AdapterMethod) -> Precision:
    """The dtype of the base's weights: the user's, else bfloat16 if they are frozen and the hardware is made for it.

    What the user says is `dtype`, or on the CPU `TUNEKIT_CPU_DTYPE` for frozen weights.

    Args:
        dtype: what the user asks for, by torch's name; None for what is best here.
        device: where the weights are ("cpu", "cuda", "cuda:1").
        method: what is trained.

    Raises:
        ConfigError: float16 on the CPU, or another `TUNEKIT_CPU_DTYPE` than float32 and bfloat16.
    """
    check_dtype(dtype, device)
    if dtype:
        return Precision(dtype, "as asked for")
    if method.trains_base:
        return Precision("float32", "these weights are trained, and a step would be lost in bfloat16")
    if device == "cpu" and (named := _named()):
        return Precision(named, f"{VARIABLE} says so")
    where = "this GPU" if device.startswith("cuda") else "this processor"
    if multiplies_bfloat16(device):
        return Precision("bfloat16", f"the base is frozen, and {where} multiplies bfloat16 quickly")
    return Precision("float32", f"{where} has no quick bfloat16", smaller="bfloat16")


def _named() -> str | None:
    """What `TUNEKIT_CPU_DTYPE` says; None where it is not set."""
    named = os.environ.get(VARIABLE) or None
    if named not in (None, "float32", "bfloat16"):
        raise ConfigError(f"must be 'float32', 'bfloat16' or unset, got {named!r}", VARIABLE)
    return named


def multiplies_bfloat16(device: str) -> bool:
    """Whether `device` multiplies bfloat16 faster than float32.

    Of GPUs those from compute capability 8 on (Ampere); of processors those with AMX or AVX512-BF16. torch computes in
    bfloat16 on any, by detours.
    """
    import torch

    if device.startswith("cuda"):
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
