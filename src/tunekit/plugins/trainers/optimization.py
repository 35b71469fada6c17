"""Optimizers by name; how large an optimizer's states are, and whether a checkpoint's are of this run."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tunekit.core.model.quick_imports import import_bitsandbytes
from tunekit.core.training.sharded import cut_alike
from tunekit.errors import TrainingError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


OPTIMIZERS = {
    "adamw": "torch.optim:AdamW",
    "adamw-8bit": "bitsandbytes.optim:AdamW8bit",
    "adafactor": "torch.optim:Adafactor",
    "sgd": "torch.optim:SGD",
}
SHARDED = ("adamw", "sgd")
"""Those that work number by number, and so on any piece of a parameter."""


def make(name: str, model: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    """The optimizer of that name over what `model` trains; vectors (biases, norms) do not decay.

    On CUDA all parameters move in one pass over memory where torch has it so, which takes no memory for itself.
    """
    module, _, attribute = OPTIMIZERS[name].partition(":")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    if module.startswith("bitsandbytes"):
        import_bitsandbytes()
    optimizer = getattr(importlib.import_module(module), attribute)
    one_pass = knows(optimizer, "fused") and all(parameter.is_cuda for parameter in trained)
    options = {"fused": True} if one_pass else {}
    return optimizer([group for group in groups if group["params"]], lr=learning_rate, **options)


def knows(optimizer: type[Optimizer], option: str) -> bool:
    """Whether optimizers of this type can be made with `option`."""
    return option in inspect.signature(optimizer).parameters


def size(optimizer: Optimizer) -> int:
    """Bytes of tensors in the states that `optimizer` will have once it took a step; its parameters may be on meta."""
    known: dict[Any, int] = {}
    total = 0
    for parameter in _parameters(optimizer):
        key = (parameter.shape, parameter.dtype)
        if key not in known:
            tensors = _tensors(_expected(optimizer, parameter)).values()
            known[key] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        total += known[key]
    return total


def restore(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Put the states of a checkpoint into `optimizer`; its learning rate and the like stay as they are.

    torch takes states of any shape, and ends the process at the first step if they are wrong. So they are compared
    with those that the optimizer would make itself; TrainingError, naming the parameter's shape, if they differ.
    """
    parameters = _parameters(optimizer)
    counts = [[len(group["params"]) for group in groups] for groups in (optimizer.param_groups, saved["param_groups"])]
    if counts[0] != counts[1] or not set(saved["state"]) <= set(range(len(parameters))):
        raise TrainingError(
            f"the optimizer's states in the checkpoint are of {counts[1]} parameters (by group), this run trains "
            f"{counts[0]}; it cannot be resumed"
        )
    for number, state in saved["state"].items():
        parameter = parameters[number]
        here, there = _shapes(_expected(optimizer, parameter)), _shapes(state)
        if here != there:
            raise TrainingError(
                f"the optimizer's states in the checkpoint are not of parameter {number}, of shape "
                f"{list(parameter.shape)}: they are {there}, and must be {here}; it cannot be resumed"
            )
    groups = optimizer.state_dict()["param_groups"]
    states = {number: cut_alike(parameters[number], state) for number, state in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": states, "param_groups": groups})


def _expected(optimizer: Optimizer, parameter: nn.Parameter) -> Mapping[str, Any]:
    """The state of `parameter` after a first step, on the meta device: without memory, and without data."""
    import torch

    empty = torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
    empty.grad = torch.empty_like(empty)
    alone = type(optimizer)([empty], lr=1.0)
    # Adafactor asks for a number, which a tensor without data has not; its state is made by then.
    with suppress(RuntimeError):
        alone.step()
    state: Mapping[str, Any] = alone.state_dict()["state"].get(0, {})
    return state


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters, in the order in which their states are numbered."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _shapes(state: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in sorted(_tensors(state).items())}


def _tensors(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The tensors in a state by name, those in tables within it too (bitsandbytes has one)."""
    import torch

    found = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            found[prefix + name] = value
        elif isinstance(value, Mapping):
            found |= _tensors(value, f"{prefix}{name}.")
    return found
