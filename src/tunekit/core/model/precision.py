"""In which dtype a run multiplies and its frozen weights are held, and why.

A frozen weight is only multiplied with, so half the bits serve as well where the hardware multiplies them quickly: half
the memory, and up to twice or more the speed. It is loaded in that dtype once, and never cast again. What is trained
is held in float32 in any case, and rounded to that dtype whenever it is multiplied with; see `masters`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

from tunekit.core.interfaces import AdapterMethod
from tunekit.core.model.products import measured, shapes_of
from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

VARIABLE = "TUNEKIT_CPU_DTYPE"
"""Names the dtype on the CPU, where `Pipeline.dtype` does not: the same on unlike processors."""


@attrs.frozen
class Precision:
    """What a run multiplies in; frozen weights are held in it, and trained ones in float32.

    Args:
        dtype: torch's name of it.
        reason: why it was chosen.
        smaller: what is taken instead where it does not fit into the memory that the user allows; None for nothing.
        trained: in which dtype trained weights are held.
    """

    dtype: str
    reason: str
    smaller: str | None = None
    trained: str = "float32"

    def __str__(self) -> str:
        held = "" if self.dtype == self.trained else f"; what is trained is held in {self.trained}"
        return f"{self.dtype}: {self.reason}{held}"


def check_dtype(dtype: str | None, device: str | None) -> None:
    """Raise ConfigError for a dtype that cannot be, asked for here or by `TUNEKIT_CPU_DTYPE`; imports no torch.

    float16 cannot on the CPU, which has no arithmetic for it to train with.
    """
    _named()
    if dtype == "float16" and device == "cpu":
        raise ConfigError("float16 does not train on the CPU; use float32 or bfloat16", "Pipeline.dtype")


def check_scheme(scheme: str | None, method: AdapterMethod) -> None:
    """Raise ConfigError for a method that cannot train on a base in this quantization; imports no torch."""
    if scheme and scheme not in method.supports:
        able = ", ".join(sorted(method.supports)) or "none: quantize nothing, or choose LoRA"
        raise ConfigError(f"{method.name} cannot train on a {scheme} base; it supports {able}", "Pipeline.adapter")


def choose_precision(
    dtype: str | None,
    device: str,
    method: AdapterMethod,
    model: Callable[[], nn.Module],
) -> Precision:
    """The dtype of the base's weights: the user's, else bfloat16 if the hardware is quicker so.

    What the user says is `dtype`, or on the CPU `TUNEKIT_CPU_DTYPE`. What a processor is quicker in is measured on
    layers of the base, where it has instructions for bfloat16 at all.

    Args:
        dtype: what the user asks for, by torch's name; None for what is best here.
        device: where the weights are ("cpu", "cuda", "cuda:1").
        method: what is trained.
        model: makes the base, on the meta device; called only where something is measured.

    Raises:
        ConfigError: float16 on the CPU, or another `TUNEKIT_CPU_DTYPE` than float32 and bfloat16.
    """
    check_dtype(dtype, device)
    if dtype:
        return Precision(dtype, "as asked for")
    if device == "cpu" and (named := _named()):
        return Precision(named, f"{VARIABLE} says so")
    where = "this GPU" if device.startswith("cuda") else "this processor"
    # Of weights that are trained, copies in the smaller one would come on top.
    smaller = None if method.trains_base else "bfloat16"
    if not multiplies_bfloat16(device):
        return Precision("float32", f"{where} has no quick bfloat16", smaller)
    if device != "cpu":
        return Precision("bfloat16", f"{where} multiplies bfloat16 quickly")
    if not (shapes := shapes_of(model())):
        return Precision("float32", "the base's layers are too small for bfloat16 to pay", smaller)
    found = measured(shapes)
    if found.bfloat16_pays:
        return Precision("bfloat16", f"{where} multiplies {found.in_words('bfloat16')}")
    return Precision("float32", f"{where} multiplies {found.in_words('float32')}", smaller)


def _named() -> str | None:
    """What `TUNEKIT_CPU_DTYPE` says; None where it is not set."""
    named = os.environ.get(VARIABLE) or None
    if named not in (None, "float32", "bfloat16"):
        raise ConfigError(f"must be 'float32', 'bfloat16' or unset, got {named!r}", VARIABLE)
    return named


def multiplies_bfloat16(device: str) -> bool:
    """Whether `device` has instructions that multiply bfloat16; torch computes in it on any, by detours.

    Of GPUs those from compute capability 8 on (Ampere), where they are quick; of processors those with AMX or
    AVX512-BF16, where they may be slower than those for float32 all the same.
    """
    import torch

    if device.startswith("cuda"):
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
