"""A model whose predictions are far from even, so that what changes them is seen."""

import torch
from transformers import AutoModelForCausalLM


def sharp(config):
    """The model of a configuration, with the same large random matrices each time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model
