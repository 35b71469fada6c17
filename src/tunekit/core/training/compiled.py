"""Decoder layers compiled by torch.compile while a model is trained, and plain again afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from tunekit.core.model import masters
from tunekit.errors import NotSupported

if TYPE_CHECKING:
    from torch import nn

BACKEND = "inductor"
"""What torch.compile makes kernels with; it keeps them on disk, for a second run over layers of the same shape."""
WORTHWHILE_STEPS = 1000
"""From so many steps on, compilation is taken to repay its minute: a step has to become 60 ms shorter."""


def worthwhile(asked: bool | Literal["auto"], steps: int) -> bool:
    """Whether layers are to be compiled for so many steps; "auto" leaves it to their number."""
    return steps >= WORTHWHILE_STEPS if asked == "auto" else asked


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers never divides among devices: those that repeat, the smallest unit worth compiling.

    Raises NotSupported for a model that does not name them.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise NotSupported(f"{type(model).__name__} does not name its layers")
    return found


@contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """Within it, each decoder layer of `model` is compiled, for any number of tokens; afterwards all are plain.

    One layer at a time, since layers are alike: their one graph is compiled once. The modules stay the same ones, and
    so do the names of their parameters.

    Raises NotSupported for layers with master weights: torch compiles each anew, since their hooks are different ones.
    """
    layers = decoder_layers(model)
    if any(masters.are_in(layer) for layer in layers):
        raise NotSupported("what is trained in them is held in float32 and seen rounded; dtype='float32' compiles")
    before = [layer._compiled_call_impl for layer in layers]
    for layer in layers:
        layer.compile(dynamic=True, backend=BACKEND)
    try:
        yield
    finally:
        for layer, call in zip(layers, before, strict=True):
            layer._compiled_call_impl = call


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Within it, inside of `compiled`, the layers of `model` run as they are written."""
    layers = decoder_layers(model)
    before = [layer._compiled_call_impl for layer in layers]
    for layer in layers:
        layer._compiled_call_impl = None
    try:
        yield
    finally:
        for layer, call in zip(layers, before, strict=True):
            layer._compiled_call_impl = call
