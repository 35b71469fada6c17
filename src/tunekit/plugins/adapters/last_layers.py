"""LastLayers: the first layers are frozen, the last are trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from tunekit.core.component import Context
from tunekit.core.fields import at_least
from tunekit.core.interfaces import AdapterMethod
from tunekit.core.model import trained_tensors
from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@attrs.frozen(kw_only=True)
class LastLayers(AdapterMethod):
    """Train the last decoder layers whole; embeddings, the layers before, the final norm and the head stay frozen.

    Trained parameters: `count` times those of a layer. No gradient goes back further than the first trained layer,
    which saves time and memory. Trained weights are float32; over a base in bfloat16 they are rounded for as long as
    they are multiplied with. Lee et al. 2019, https://arxiv.org/abs/1911.03090.

    Args:
        count: how many layers are trained, counted from the last.
    """

    name = "last-layers"
    learning_rate = 2e-5
    trains_base = True
    count: int = attrs.field(default=2, validator=at_least(1))

    def attach(self, model: PreTrainedModel, context: Context) -> nn.Module:
        """Freeze the model and make its last layers trainable."""
        model.requires_grad_(False)
        for parameter in self._last(model).values():
            parameter.requires_grad = True
        return model

    def save(self, model: nn.Module, directory: Path) -> None:
        """Write the trained layers into `trained.safetensors`."""
        trained_tensors.save(self._last(model), directory)

    def load(self, model: PreTrainedModel, directory: Path) -> nn.Module:
        """Put the saved layers in the place of the base's."""
        trained_tensors.load(self._last(model), directory, "LastLayers")
        return model

    def merge(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """The model itself: there is nothing to fold in."""
        return model

    def _last(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of the last layers by their full names."""
        from torch import nn

        size = model.config.get_text_config().num_hidden_layers
        lists = [(name, found) for name, found in model.named_modules() if isinstance(found, nn.ModuleList)]
        if model.config.is_encoder_decoder:  # the encoder's list stands first, and the decoder's may have another size
            within = set(model.get_decoder().modules())
            lists = [(name, found) for name, found in lists if found in within]
            size = len(lists[0][1])
        stacks = [name for name, found in lists if len(found) == size]
        if not stacks:
            raise ConfigError(f"{type(model).__name__} has no list of its {size} layers", "LastLayers")
        if self.count > size:
            raise ConfigError(f"the model has {size} layers, so {self.count} are too many", "LastLayers.count")
        stack = min(stacks, key=lambda name: name.count("."))
        last = tuple(f"{stack}.{number}." for number in range(size - self.count, size))
        return {name: parameter for name, parameter in model.named_parameters() if name.startswith(last)}
