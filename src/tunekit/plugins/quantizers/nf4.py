"""NF4: four bits a weight, by bitsandbytes."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.interfaces import Quantizer
from tunekit.core.model.quick_imports import import_bitsandbytes
from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@attrs.frozen(kw_only=True)
class NF4(Quantizer):
    """Every linear weight but the output head as 4-bit NormalFloat: the nearest of 16 values, scaled block by block.

    The 16 values are quantiles of the normal distribution; each block of 64 weights is divided by its largest absolute
    value, which is kept: 4 + 32 / 64 = 4.5 bits a weight. With double quantization these scales are stored in 8 bits,
    with a second scale for every 256 of them: 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight.
    Dettmers et al. 2023, https://arxiv.org/abs/2305.14314. On CUDA and on the CPU.

    Args:
        double_quantization: whether the scales of the blocks are quantized too.
        compute_dtype: dtype in which weights are multiplied with activations; None takes that of the base.
    """

    name = "nf4"
    scheme = "nf4"
    requires = ("bitsandbytes",)
    shardable = True

    double_quantization: bool = True
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def check(self, context: Context) -> None:
        """Refuse float16 arithmetic on the CPU."""
        if self.compute_dtype == "float16" and context.device == "cpu":
            raise ConfigError("float16 does not train on the CPU; use float32 or bfloat16", "NF4.compute_dtype")

    def load_kwargs(self, context: Context) -> dict[str, Any]:
        """A BitsAndBytesConfig."""
        from transformers import BitsAndBytesConfig

        import_bitsandbytes()  # as transformers does to load, only quicker
        return {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=self.double_quantization,
                bnb_4bit_compute_dtype=self.compute_dtype or context.dtype,
            )
        }

    def prepare(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Freeze the model, and keep clear of two faults that bitsandbytes has on the CPU.

        Raises:
            ConfigError: on the CPU, a layer whose number of inputs is no multiple of 32.
        """
        model.requires_grad_(False)
        for name, module in model.named_modules():
            if self.is_quantized(module) and module.weight.device.type == "cpu":
                _fit_blocks_to_rows(module, name)
                # On processors with AVX512-BF16 the first evaluation repacks the weights for a faster kernel, whose
                # layout the backward pass does not know: gradients are silently wrong ever after.
                module.support_avx512bf16_for_cpu = False
        return model

    def is_quantized(self, module: nn.Module) -> bool:
        """Whether it is a Linear4bit of bitsandbytes."""
        from bitsandbytes.nn import Linear4bit

        return isinstance(module, Linear4bit)

    def stored_bytes(self, weight: Tensor) -> tuple[int, int]:
        """Half a byte a weight; for each block of 64 a scale of 4 bytes, or of one and 4 bytes for every 256 of them.

        Besides, the tables of values: 16 of the weights, 256 of the scales, and the mean of the scales.
        """
        blocks = math.ceil(weight.numel() / 64)
        scales = blocks + 4 * math.ceil(blocks / 256) + 4 * 257 if self.double_quantization else 4 * blocks
        return math.ceil(weight.numel() / 2), scales + 4 * 16

    def dequantize(self, module: nn.Module) -> Tensor:
        """The 16 values times the scales, in float32 whatever the dtype of the base."""
        import torch
        from bitsandbytes.functional import dequantize_4bit

        state = copy.copy(module.weight.quant_state)
        state.dtype = torch.float32
        return dequantize_4bit(module.weight.data, state)


def _fit_blocks_to_rows(module: nn.Module, name: str) -> None:
    """Split the blocks of 64 so that they end with the rows, each part with a copy of the scale: the same weights.

    The kernel of bitsandbytes for the CPU counts blocks row by row. Where 64 does not divide the number of inputs, it
    takes the scales of other blocks, or reads past the last.
    """
    state = module.weight.quant_state
    size = math.gcd(module.in_features, state.blocksize)
    if size < 32:  # bitsandbytes has no smaller blocks
        raise ConfigError(
            f"{name} has {module.in_features} inputs, no multiple of 32: wrong on the CPU; use CUDA or Int8", "NF4"
        )
    parts = state.blocksize // size
    if parts > 1:
        state.absmax = state.absmax.repeat_interleave(parts)
        state.blocksize = size
        if state.nested:
            state.state2.absmax = state.state2.absmax.repeat_interleave(parts)
