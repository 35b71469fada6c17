"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from tunekit.core.component import Context
from tunekit.core.interfaces import AdapterMethod
from tunekit.core.model import trained_tensors

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@attrs.frozen(kw_only=True)
class Full(AdapterMethod):
    """Full fine-tuning: every parameter W becomes W + dW, with nothing added and nothing frozen.

    It learns the most and forgets the most, and needs memory for a gradient and the optimizer's two moments of every
    parameter: four times the weights with AdamW. It takes a small learning rate. Weights are float32; over a base in
    bfloat16 they are rounded for as long as they are multiplied with. What is saved is as large as the model. Howard
    and Ruder 2018, https://arxiv.org/abs/1801.06146; compared with LoRA by Biderman et al. 2024,
    https://arxiv.org/abs/2405.09673.
    """

    name = "full"
    learning_rate = 1e-5
    trains_base = True
    trains_added_tokens = True

    def attach(self, model: PreTrainedModel, context: Context) -> nn.Module:
        """Make every parameter trainable."""
        return model.requires_grad_(True)

    def save(self, model: nn.Module, directory: Path) -> None:
        """Write every parameter into `trained.safetensors`, shared ones once."""
        trained_tensors.save(dict(model.named_parameters()), directory)

    def load(self, model: PreTrainedModel, directory: Path) -> nn.Module:
        """Put the saved parameters in the place of the base's."""
        trained_tensors.load(dict(model.named_parameters()), directory, "Full")
        return model

    def merge(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """The model itself: there is nothing to fold in."""
        return model
