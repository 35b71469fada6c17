"""Bottleneck: small networks behind the blocks of every layer."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.fields import at_least
from tunekit.core.interfaces import AdapterMethod
from tunekit.core.model import targets, trained_tensors
from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

LAYOUT = "bottleneck.json"
MODULE = "bottleneck_adapter"
"""What a layer calls the module behind it; MobileBERT has a `bottleneck` of its own."""


@attrs.frozen(kw_only=True)
class Bottleneck(AdapterMethod):
    """Adapter tuning: the output h of a block becomes h + up(activation(down(h))), and only down and up are trained.

    Both are linear layers with biases, from d features to `size` and back: 2 * size * d + d + size parameters a
    module, of which "houlsby" puts two into each layer and "pfeiffer" one. up starts at zero, so the model starts as
    its base. A module stands on the output of the linear layer that ends the block, before the residual is added;
    blocks that attend to an encoder have one of their own. Norms stay frozen; Houlsby et al. train them besides.
    Houlsby et al. 2019, https://arxiv.org/abs/1902.00751; Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00247.

    Its learning rate, where the trainer leaves it open, is five times LoRA's. In 69 steps on `tunekit.ORDERS` the
    held-out loss of `tunekit.TINY` falls from 7.18 to 0.29 at 1e-3; with "relu" to 3.49 at 2e-4, 0.32 at 1e-3, 0.16 at
    2e-3 and 0.14 at 5e-3, and 0.70 at 1e-3 with "pfeiffer" (LoRA at 2e-4: 3.24). Houlsby et al. try 3e-5
    to 3e-3, Pfeiffer et al. take 1e-4.

    It is not linear, so it cannot be merged into the base: keep both side by side. Generation pays for two more small
    layers a module. Over a base of fewer bits, or in bfloat16, its parameters are float32.

    Args:
        size: features of the bottleneck; parameters grow with it.
        placement: "houlsby": behind the attention and behind the feed-forward block; "pfeiffer": behind the
            feed-forward block only.
        activation: what is applied between down and up; "gelu" as in Houlsby's code, "relu" as in Pfeiffer's.
        targets: linear layers to put a module behind, as names or as a regular expression for their whole names; None
            for those that `placement` stands for, by the names that are usual for them.
    """

    name = "bottleneck"
    supports = frozenset({"nf4", "int8"})
    learning_rate = 1e-3

    size: int = attrs.field(default=64, validator=at_least(1))
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    activation: Literal["relu", "gelu", "silu"] = "gelu"
    targets: str | tuple[str, ...] | None = None

    def attach(self, model: PreTrainedModel, context: Context) -> nn.Module:
        """Freeze the model and put a module behind each place; what is there keeps its class and its name."""
        layers = [model.get_submodule(place) for place in self._places(model)]
        model.requires_grad_(False)
        for layer in layers:
            layer.add_module(MODULE, self._module(layer))
            # A hook, not a wrapper: T5 asks its layer for `weight`, and checkpoints of the base keep their names. And
            # a function that finds the module in the layer it is called for: a deep copy then uses the copy's own.
            layer.register_forward_hook(_add)
        return model

    def save(self, model: nn.Module, directory: Path) -> None:
        """Write the modules into `trained.safetensors`, and their layout into `bottleneck.json`."""
        places = [name for name, layer in model.named_modules() if hasattr(layer, MODULE)]
        trained_tensors.save(_parameters(model), directory)
        (directory / LAYOUT).write_text(json.dumps(self._layout(places), indent=2) + "\n", encoding="utf-8")

    def load(self, model: PreTrainedModel, directory: Path) -> nn.Module:
        """Put the saved modules into their places; ConfigError unless size, placement, activation and names agree."""
        path = directory / LAYOUT
        try:
            stored = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"cannot read {path}: {error}", "Bottleneck") from error
        for key, here in self._layout(self._places(model)).items():
            if stored.get(key) != here:
                raise ConfigError(f"{path} has other {key}: {stored.get(key)} there, {here} here", "Bottleneck")
        model = self.attach(model, Context(model_id=""))
        trained_tensors.load(_parameters(model), directory, "Bottleneck")
        return model

    def _places(self, model: nn.Module) -> list[str]:
        """The full names of the linear layers to put a module behind, in the model's order."""
        where = "Bottleneck.targets"
        if self.targets is None:
            blocks = ("attention", "mlp") if self.placement == "houlsby" else ("mlp",)
            return targets.ends(model, blocks, where)
        names, linear = targets.select(model, self.targets, where), targets.linear_layers(model)
        if other := [name for name in names if name not in linear]:
            raise ConfigError(f"{other[0]} is no linear layer; name some out of {', '.join(linear)}", where)
        return names

    def _layout(self, places: list[str]) -> dict[str, Any]:
        return {"size": self.size, "placement": self.placement, "activation": self.activation, "names": places}

    def _module(self, layer: nn.Module) -> nn.Module:
        """A module for the output of `layer`: (..., d) to (..., d)."""
        import torch
        from torch import nn

        width = layer.nf if hasattr(layer, "nf") else layer.out_features  # Conv1D has its own word for it
        masters: dict[str, Any] = {"device": layer.weight.device, "dtype": torch.float32}
        down, up = nn.Linear(width, self.size, **masters), nn.Linear(self.size, width, **masters)
        for start in (down.bias, up.weight, up.bias):
            nn.init.zeros_(start)
        activation = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}[self.activation]()
        return nn.Sequential(OrderedDict(down=down, activation=activation, up=up))


def _add(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """The output of `layer` and what its module makes of it; in the parameters' dtype, and rounded once."""
    module = getattr(layer, MODULE)
    hidden = output.to(module.down.weight.dtype)
    total: Tensor = hidden + module(hidden)
    return total.to(output.dtype)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the modules by their full names."""
    return {name: parameter for name, parameter in model.named_parameters() if MODULE in name.split(".")}
