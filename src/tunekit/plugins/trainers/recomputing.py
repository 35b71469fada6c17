"""Gradient checkpointing: activations that are computed again in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from tunekit.errors import NotSupported

if TYPE_CHECKING:
    from torch import nn


def layers_to_recompute(model: nn.Module) -> list[nn.Module]:
    """The layers that can be recomputed one by one, in their order: from the first on that keeps anything.

    Layers below everything that is trained keep nothing, and recomputing them would save nothing.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    within = [not trained.isdisjoint(layer.parameters()) for layer in layers]
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    if not trained <= inside:  # embeddings or virtual tokens, perhaps
        return layers
    return layers[within.index(True) :] if True in within else layers


@contextmanager
def activations_computed_again(
    model: nn.Module, layers: int | None, within: Callable[[], AbstractContextManager[Any]] | None = None
) -> Iterator[None]:
    """Within it, training `model` keeps of some layers nothing but their inputs; NotSupported if it cannot do so.

    Args:
        model: the module that is trained.
        layers: how many, the first of those that keep anything; None for all. The first, since they come last in the
            backward pass, when what the others kept is gone: there is room for what is computed again.
        within: makes what layers are computed again in, for a mode that a backward pass suspends.
    """
    if layers == 0:
        yield
        return
    # Transformers has given it the first name of late.
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    options: dict[str, Any] = {"use_reentrant": False}
    if within:
        options["context_fn"] = lambda: (nullcontext(), within())
    try:
        getattr(model, f"{word}_checkpointing_enable")(options)
    except (AttributeError, ValueError) as error:
        raise NotSupported(f"{type(model).__name__} knows no gradient checkpointing: {error}") from None
    try:
        if layers is not None:
            for layer in layers_to_recompute(model)[layers:]:
                layer.gradient_checkpointing = False
        yield
    finally:
        getattr(model, f"{word}_checkpointing_disable")()
