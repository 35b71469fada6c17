"""Lean forwards are not taken on trust: they are tried on the user's model, against PEFT's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tunekit.core.lean.forwards import lean_forwards

if TYPE_CHECKING:
    from torch import Tensor, nn

LOSS = {"float32": 1e-5, "float64": 1e-5}
"""Relative difference of the losses that is rounding alone; of bfloat16 and float16, which round more, 1e-2."""
GRADIENT = {"float32": 1e-4, "float64": 1e-4}
"""The same of the gradients, as the length of their difference; in half precision a tenth, where a mistake is more."""
STIR = 0.02
"""How far trained tensors are moved while trying, as a standard deviation: many start at zero, which hides mistakes."""


def fault(model: nn.Module, loss: Callable[[], Tensor], kept_bytes: int | None = None) -> str | None:
    """Why lean forwards are not right for `model`; None if they are.

    Tried in training mode with the same random numbers, dropout included, on adapters that were moved from where they
    start. Afterwards parameters, gradients, modes and random states are what they were.

    Args:
        model: with an adapter of PEFT's.
        loss: a loss of `model`, with a graph.
        kept_bytes: see `lean_forwards`.
    """
    try:
        with lean_forwards(model, kept_bytes) as lean:
            tensors = [tensor for one in lean for tensor in one.tensors() if tensor.requires_grad]
            with stirred(tensors), training(model):
                found = _loss_and_gradient(loss, tensors)
        with stirred(tensors), training(model):
            expected = _loss_and_gradient(loss, tensors)
    except Exception as error:  # whatever a model of somebody else's raises, there is PEFT's forward
        return f"{type(error).__name__}: {error}"
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if not abs(found[0] - expected[0]) <= LOSS.get(dtype, 1e-2) * abs(expected[0]):
        return f"the loss is {found[0]:.6g} so, and {expected[0]:.6g} by PEFT's"
    apart, length = float((found[1] - expected[1]).norm()), float(expected[1].norm())
    if not apart <= GRADIENT.get(dtype, 1e-1) * length:
        return f"the gradient is {apart:.3g} away from PEFT's, whose length is {length:.3g}"
    return None


def _loss_and_gradient(loss: Callable[[], Tensor], tensors: Sequence[Tensor]) -> tuple[float, Tensor]:
    import torch

    # Of the devices they are on, which need not be the current one; `torch.manual_seed` would seed all there are.
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[at] for at in devices)):
            generator.manual_seed(0)
        found = loss()
        gradients = torch.autograd.grad(found, tensors, materialize_grads=True)
    return float(found.detach()), torch.cat([gradient.flatten().float() for gradient in gradients])


@contextmanager
def stirred(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within it, the tensors are somewhere else, always at the same place."""
    import torch

    kept = [tensor.detach().clone() for tensor in tensors]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in tensors:
            tensor += STIR * torch.randn(tensor.shape, generator=generator).to(tensor)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Within it, training mode; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
