"""The frozen linear layer beneath an adapter: its weight as it is multiplied, kept dequantized while memory allows.

Only ever imported from inside of methods, since it imports torch.
"""

import copy
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tunekit.core.model.hooks import is_hooked

UNPACKED = "unpacked"
"""The method by which what stands in for a quantized layer, where nothing is computed, makes a weight of a dtype."""


@attrs.define(eq=False)
class Budget:
    """Bytes that may still be taken for dequantized weights."""

    bytes: int

    def take(self, size: int) -> bool:
        """Whether there were `size` bytes left; they are taken then."""
        if size > self.bytes:
            return False
        self.bytes -= size
        return True


@attrs.define(eq=False)
class Frozen:
    """A frozen linear layer y = W x + b, plain, transposed (GPT-2's Conv1D), or quantized by bitsandbytes.

    Args:
        module: the layer.
        budget: what its dequantized weight may be kept out of.
    """

    module: Any
    budget: Budget
    _kept: Tensor | None = None
    _transposed: bool = attrs.field(init=False)
    _quantized: bool = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._transposed = type(self.module).__name__ == "Conv1D"
        self._quantized = not self.module.weight.is_floating_point()

    @property
    def bias(self) -> Tensor | None:
        """The bias (out_features), which may be trained, as it is added; None if there is none."""
        found: Tensor | None = self.module.bias
        if found is None or self._quantized:
            return found
        return found.to(self.module.weight.dtype)  # one that is trained is float32

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether the layer multiplies activations of `dtype` as they are."""
        if self._quantized:
            return getattr(self.module, "compute_dtype", None) in (None, dtype)
        return bool(self.module.weight.dtype == dtype)

    def dequantized_bytes(self, dtype: torch.dtype) -> int:
        """What its weight takes dequantized; 0 for one that is not quantized."""
        return int(self._quantized * self.module.in_features * self.module.out_features * dtype.itemsize)

    def saved_bytes(self) -> int:
        """What its weight takes less than it would in half precision; 0 for one that is not quantized."""
        weight = self.module.weight
        half = 2 * self.module.in_features * self.module.out_features
        return int(self._quantized * max(0, half - weight.numel() * weight.element_size()))

    def drop(self) -> bool:
        """Keep no dequantized weight from here on; whether there was one."""
        had, self._kept, self.budget.bytes = self._kept is not None, None, 0
        return had

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight (out_features, in_features) in `dtype`: the very numbers that the layer computes with."""
        if not self._quantized:
            weight: Tensor = self.module.weight
            return weight.T if self._transposed else weight
        if self._kept is not None and self._kept.dtype == dtype:
            return self._kept
        made = dequantized(self.module, dtype)
        if self._kept is None and self.budget.take(made.numel() * made.element_size()):
            self._kept = made
        return made


def frozen(layer: Any, budget: Budget) -> Frozen | None:
    """What `layer`, one of PEFT's, adapts; None where it does more than to multiply with a weight that stays."""
    # LoHa and LoKr have one before a packed layer that shows its shape.
    module = getattr(layer.base_layer, "packed", layer.base_layer)
    kind = type(module)
    name = _name(kind)
    known = kind is nn.Linear or name in ("transformers.Conv1D", "bitsandbytes.Linear4bit") or hasattr(module, UNPACKED)
    if name == "bitsandbytes.Linear8bitLt":
        # On CUDA it multiplies integers, rounding the activations too; on the CPU it dequantizes, while training.
        known = module.weight.device.type == "cpu"
    if not known or is_hooked(module) or "forward" in vars(module) or module.weight.requires_grad:
        return None
    if kind is nn.Linear and type(module.weight) is not nn.Parameter:
        return None  # a part of a weight that several processes share
    return Frozen(module, budget)


def _name(kind: type[Any]) -> str:
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` is a linear layer of bitsandbytes, whose weight `dequantized` makes."""
    return _name(type(module)) in ("bitsandbytes.Linear4bit", "bitsandbytes.Linear8bitLt")


def dequantized(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight (out_features, in_features) of a quantized layer, as bitsandbytes makes it to multiply in `dtype`."""
    if stands_in := getattr(module, UNPACKED, None):
        found: Tensor = stands_in(dtype)
        return found
    from bitsandbytes.functional import dequantize_4bit

    with torch.no_grad():
        if type(module).__name__ == "Linear4bit":
            state = copy.copy(module.weight.quant_state)
            state.dtype = dtype
            weight: Tensor = dequantize_4bit(module.weight.data, state)
            return weight
        # The first forward pass moves the scales from the weight into the state of the module.
        scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        return module.weight.data.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))


def frozen_linear(x: Tensor, base: Frozen) -> Tensor:
    """W x + bias, (..., out_features), which asks for W again in the backward pass.

    So a dequantized weight that is not kept is not held in between, either.
    """
    found: Tensor = _FrozenLinear.apply(x, base.bias, base)
    return found


class _FrozenLinear(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, base: Frozen) -> Tensor:
        ctx.base = base
        return linear(x, base.weight(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        of_x = gradient @ ctx.base.weight(gradient.dtype) if ctx.needs_input_grad[0] else None
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return of_x, of_bias, None
