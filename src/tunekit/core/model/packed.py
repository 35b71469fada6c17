"""PEFT's adapter layers over quantized ones: two things that PEFT has wrong there, put right on the modules we made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunekit.core.model.hooks import needless_where_lean

if TYPE_CHECKING:
    from torch import Tensor, nn


def is_packed(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight is not stored as (out_features, in_features), such as one of NF4."""
    from torch import nn

    return isinstance(module, nn.Linear) and module.weight.shape != (module.out_features, module.in_features)


def show_shapes(model: nn.Module) -> None:
    """Stand a linear layer that shows its shape in the place of each packed one of `model`, and computes by it.

    LoHa and LoKr make an update of the shape of `base_layer.weight`, and PEFT reads it anew in every forward pass: for
    NF4 it is (out_features * in_features / 2, 1), and training fails.
    """
    for name, module in list(model.named_modules()):
        if is_packed(module):
            model.set_submodule(name, _shaped(module))


def keep_dtypes(model: nn.Module) -> None:
    """Have each adapter layer over a quantized linear one return the dtype that it is given, as this one does.

    PEFT's IA3 returns float32 for bfloat16, and so does its AdaLoRA in 8 bits: the layers that follow cannot take it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    for module in model.modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else None
        if isinstance(base, nn.Linear) and not base.weight.is_floating_point():
            module.register_forward_hook(_as_given)


def _shaped(packed: nn.Module) -> nn.Module:
    import torch

    layer = torch.nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
    # No parameter, and of any shape one number large: it says shape and device, and nothing computes with it.
    del layer.weight
    layer.weight = torch.zeros(1, device=packed.weight.device).expand(packed.out_features, packed.in_features)
    layer.packed = packed
    layer.forward = packed.__call__
    return layer


@needless_where_lean
def _as_given(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(inputs[0].dtype)
