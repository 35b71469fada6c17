"""The gated MLP around a down-projection that LoRA adapts: a third less of a layer's activations is kept.

Only ever imported from inside of methods, since it imports torch.
"""

from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from tunekit.core.lean.frozen import Frozen
from tunekit.core.lean.lora import LeanLoRA
from tunekit.core.lean.low_rank import multiplied
from tunekit.core.model.hooks import is_hooked

PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
"""What such a module consists of in Llama and its kin: down(silu(gate x) * up x) (SwiGLU, arXiv 2002.05202)."""


@attrs.define(eq=False)
class LeanGated:
    """The forward of such a module: what autograd keeps of it is the outputs of gate and up, and no more.

    Plainly it keeps silu(gate x) and the product as well, each as wide, which the backward pass makes again from these
    two: two passes over them, where the projections are some thousand operations for each number.

    Args:
        module: the MLP.
        down: the lean forward of its down-projection.
    """

    module: Any
    down: LeanLoRA

    def __call__(self, x: Tensor) -> Tensor:
        """What the module's own forward gives."""
        gate, up = self.module.gate_proj(x), self.module.up_proj(x)
        if self.down.drops or not self.down.knows_now(gate):
            found: Tensor = self.module.down_proj(self.module.act_fn(gate) * up)
            return found
        a, b = self.down.factors(gate.dtype)
        base, scale = self.down.base, self.down.scale
        found = _GatedLowRank.apply(gate, up, base.bias, a, b, base, scale)
        return found


def gated(module: nn.Module) -> LeanGated | None:
    """The lean forward of `module`; None where it is no such MLP, or its down-projection none of LoRA's."""
    if {name for name, _ in module.named_children()} != PARTS or "forward" in vars(module):
        return None
    down = vars(module.down_proj).get("forward")
    plain = type(module.act_fn).__name__ in ("SiLU", "SiLUActivation") and not is_hooked(module.down_proj)
    return LeanGated(module, down) if plain and type(down) is LeanLoRA else None


class _GatedLowRank(torch.autograd.Function):  # type: ignore[misc]
    """y = W p + bias + scale * B A p, where p = silu(gate) * up; see `low_rank`."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,  # (..., in_features)
        up: Tensor,
        bias: Tensor | None,  # (out_features)
        a: Tensor,  # (rank, in_features)
        b: Tensor,  # (out_features, rank)
        base: Frozen,
        scale: float,
    ) -> Tensor:
        product = silu(gate).mul_(up).reshape(-1, gate.shape[-1])  # (tokens, in_features)
        y, inner = multiplied(product, product, a, b, base, scale, bias)
        ctx.save_for_backward(gate, up, inner, a, b)
        ctx.base, ctx.scale = base, scale
        return y.view(*gate.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gate, up, inner, a, b = ctx.saved_tensors
        of_y = gradient.reshape(-1, gradient.shape[-1])  # (tokens, out_features)
        of_inner = (of_y @ b).mul_(ctx.scale)  # (tokens, rank)
        of_b = (of_y.T @ inner).mul_(ctx.scale)
        of_product = (of_y @ ctx.base.weight(of_y.dtype)).addmm_(of_inner, a).view_as(gate)
        risen = silu(gate)
        product = risen * up
        of_a = of_inner.T @ product.view(-1, gate.shape[-1])
        of_up = risen.mul_(of_product)
        of_gate = torch.ops.aten.silu_backward(of_product.mul_(up), gate)
        of_bias = of_y.sum(0) if ctx.needs_input_grad[2] else None
        return of_gate, of_up, of_bias, of_a, of_b, None, None
