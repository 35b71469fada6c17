"""A plain training loop for the checks of adapter methods, and comparing the tensors of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from tunekit.core.data.codec import IGNORED
from tunekit.core.evaluation.predicting import evaluating
from tunekit.core.interfaces import AdapterMethod
from tunekit.core.run.checkpoint import trained_parameters

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

LEARNING_RATE = 1e-2


def train(
    adapter: AdapterMethod,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    steps: int,
    *,
    first: int = 1,
    optimizer: Optimizer | None = None,
    after_backward: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train on one batch, with every slot of the method called as a trainer must; returns the loss of each step.

    Args:
        adapter: the method that was attached.
        model: what it returned.
        batch: what is learned, over and over.
        steps: how many steps to take.
        first: the number of the first of them.
        optimizer: to go on with; None for a new one.
        after_backward: called in each step while the gradients are there.
    """
    optimizer = optimizer or new_optimizer(model)
    losses = []
    model.train()
    for step in range(first, first + steps):
        loss = cross_entropy(model, batch)
        loss.backward()
        extra = adapter.extra_loss(model)
        if extra is not None:
            extra.backward()
        after_backward()
        optimizer.step()
        adapter.after_step(model, step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def new_optimizer(model: nn.Module) -> Optimizer:
    """AdamW over the trainable parameters, without weight decay."""
    import torch

    return torch.optim.AdamW(trained_parameters(model).values(), lr=LEARNING_RATE, weight_decay=0.0)


def frozen(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training leaves alone, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, by name."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that are not bit for bit what they were."""
    import torch

    return [name for name in before if name not in after or not torch.equal(before[name], after[name])]


def distance(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference of any two elements."""
    return float((one - other).abs().max())


def logits(
    model: nn.Module, batch: Mapping[str, Tensor], training: Callable[[nn.Module], bool] = lambda module: False
) -> Tensor:
    """What the model predicts in evaluation mode, (rows, time, vocabulary), without gradients; padding set to zero.

    Args:
        model: any.
        batch: as of `Harness.batch`.
        training: says which modules are in training mode all the same.
    """
    with evaluating(model):
        for module in filter(training, model.modules()):
            module.training = True
        return _forward(model, batch) * batch["attention_mask"][:, :, None]


def cross_entropy(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean cross-entropy of the supervised tokens, in the mode the model is in."""
    from torch.nn import functional

    predicted = _forward(model, batch)[:, :-1].float()
    return functional.cross_entropy(predicted.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)


def gradients(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of `cross_entropy` in training mode for each trainable parameter that has one, from a fixed seed."""
    import torch

    torch.manual_seed(1)
    cross_entropy(model.train(), batch).backward()
    found = {name: p.grad for name, p in trained_parameters(model).items() if p.grad is not None}
    model.zero_grad()
    return found


def differing(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that are missing on one side, or differ by more than rounding."""
    names = before.keys() & after.keys()
    return sorted(before.keys() ^ after.keys()) + sorted(n for n in names if distance(before[n], after[n]) > 1e-6)


def _forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    found: Tensor = model(**inputs, use_cache=False).logits
    assert found.shape[:2] == batch["input_ids"].shape, (
        f"the logits are {tuple(found.shape)} for inputs of {tuple(batch['input_ids'].shape)}: return those "
        "of each input token, and cut off those of tokens that the method puts before"
    )
    return found
