"""Saving and loading parameters of the model itself, for methods that train some of them and add none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

FILE = "trained.safetensors"


def save(parameters: Mapping[str, nn.Parameter], directory: Path) -> None:
    """Write these parameters, by name, into `directory`."""
    from safetensors.torch import save_file

    tensors = {name: parameter.detach().contiguous() for name, parameter in parameters.items()}
    save_file(tensors, directory / FILE, metadata={"format": "pt"})


def load(parameters: Mapping[str, nn.Parameter], directory: Path, where: str) -> None:
    """Write what `save` wrote into these parameters; ConfigError unless names and shapes are the same."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read {path}: {error}", where) from error
    shapes = [{name: tuple(value.shape) for name, value in found.items()} for found in (parameters, tensors)]
    if shapes[0] != shapes[1]:
        name = min(name for name, _ in shapes[0].items() ^ shapes[1].items())
        there, stored = (found.get(name, "missing") for found in shapes)
        raise ConfigError(f"{path} is not of this model: {name} is {there} here and {stored} there", where)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
