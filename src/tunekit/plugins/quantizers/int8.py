"""Int8: eight bits a weight, by bitsandbytes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import attrs

from tunekit.core.component import Context
from tunekit.core.interfaces import Quantizer
from tunekit.core.model.hooks import needless_where_lean
from tunekit.core.model.quick_imports import import_bitsandbytes

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@attrs.frozen(kw_only=True)
class Int8(Quantizer):
    """Every linear weight but the output head as 8-bit integers, with one float32 scale a row: LLM.int8().

    A weight matrix with n columns takes 8 + 32 / n bits a weight. Activations are quantized too, row by row, except
    for columns with values above 6; on the CPU only in evaluation, while training there is with whole activations.
    Dettmers et al. 2022, https://arxiv.org/abs/2208.07339. On CUDA and on the CPU.
    """

    name = "int8"
    scheme = "int8"
    requires = ("bitsandbytes",)

    def load_kwargs(self, context: Context) -> dict[str, Any]:
        """A BitsAndBytesConfig."""
        from transformers import BitsAndBytesConfig

        import_bitsandbytes()  # as transformers does to load, only quicker
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}

    def prepare(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Freeze the model, guard its scales, and keep out of the log a line for every layer of every forward pass."""
        model.requires_grad_(False)
        for module in model.modules():
            if self.is_quantized(module):
                module.register_forward_pre_hook(_keep_scales)
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)
        return model

    def is_quantized(self, module: nn.Module) -> bool:
        """Whether it is a Linear8bitLt of bitsandbytes."""
        from bitsandbytes.nn import Linear8bitLt

        return isinstance(module, Linear8bitLt)

    def stored_bytes(self, weight: Tensor) -> tuple[int, int]:
        """A byte a weight, and 4 for each row."""
        return weight.numel(), 4 * len(weight)

    def dequantize(self, module: nn.Module) -> Tensor:
        """The integers times their row's scale, in float32."""
        # The first forward pass moves the scales from the weight into the state of the module.
        scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        return module.weight.data.float() * (scales.float()[:, None] / 127)


@needless_where_lean
def _keep_scales(module: nn.Module, inputs: object) -> None:
    """Undo a loss: `weight.to(device)`, which PEFT calls in every forward pass of DoRA, leaves the scales behind.

    They are in the state of the module by then, which bitsandbytes would overwrite with the weight's None.
    """
    if module.weight.CB is not None and module.weight.SCB is None:
        module.weight.SCB = module.state.SCB


def _is_news(record: logging.LogRecord) -> bool:
    """False for bitsandbytes' note that it rounds activations by way of float16: that is what LLM.int8() does."""
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")
