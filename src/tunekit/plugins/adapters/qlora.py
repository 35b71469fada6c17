"""QLoRA: LoRA over a base in four bits."""

from __future__ import annotations

import attrs

from tunekit.core.interfaces import Quantizer
from tunekit.core.registry import default_registry
from tunekit.plugins.adapters.lora import LoRA


@attrs.frozen(kw_only=True)
class QLoRA(LoRA):
    """LoRA over a base that is stored as NF4 with double quantization: the same fields, a quarter of the memory.

    The base takes 4.127 bits a weight; the adapter is trained in float32 and the exported model is merged onto the
    dequantized base. Another quantizer of the pipeline takes the place of NF4.
    Dettmers et al. 2023, https://arxiv.org/abs/2305.14314.

    Args:
        rank: rank of the update; parameters grow with it.
        alpha: scale of the update, divided by the rank; None means twice the rank.
        dropout: probability of dropping an input of A while training.
        targets: "all-linear" (every linear layer but the output head), "attention", "mlp", names of modules, or a
            regular expression for the whole name of linear layers.
        bias: which biases are trained besides: "none", "all", or those of the targets ("lora_only").
        variant: "standard", "rslora", "dora" or "pissa", as in LoRA.
        layers: numbers of the layers to adapt, from 0; None for all.
        trained_modules: names of modules trained whole and saved with the adapter, such as a head.
    """

    name = "qlora"

    def default_quantizer(self) -> Quantizer:
        """NF4 with double quantization."""
        found = default_registry().find("quantizer", "nf4")()
        assert isinstance(found, Quantizer)
        return found
