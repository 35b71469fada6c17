"""From a quantized base back to a plain one: what a trained adapter is merged onto."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from tunekit.core.interfaces import Quantizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dequantize(model: PreTrainedModel, quantizer: Quantizer, device: str | None = None) -> PreTrainedModel:
    """Turn `model` into one of plain layers in float32, with the very weights that its quantized layers stand for.

    Merged into the quantized weights, the training would be rounded away: an update is smaller than the steps between
    16 values. Merged into the original weights, it would be added to a base that it was not trained on.

    Args:
        model: a base that `quantizer` prepared, without an adapter; changed in place.
        quantizer: what quantized it.
        device: where the plain model goes; None leaves it where it is.
    """
    import torch

    plain = empty(model)
    for name, module in list(model.named_modules()):
        if quantizer.is_quantized(module):
            layer = plain.get_submodule(name)
            weight = quantizer.dequantize(module).to(device)
            # GPT-2's layers are Conv1D, whose weight is stored the other way round.
            weight = weight if isinstance(layer, torch.nn.Linear) else weight.T.contiguous()
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            layer.bias = module.bias
            model.set_submodule(name, layer)
    return _forget_quantization(model).to(device).float()


def empty(model: PreTrainedModel) -> PreTrainedModel:
    """A model built as `model` is without quantization, on the meta device."""
    import torch

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return type(model)(config)


def _forget_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """Take away the marks by which transformers and PEFT know a quantized model, and refuse to cast or save it."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, mark):
            delattr(model, mark)
    return model
