"""LoKr while training: by its factors, without ever making their Kronecker product.

Only ever imported from inside of methods, since it imports torch.
"""

from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.functional import linear

from tunekit.core.lean.forward import LeanForward
from tunekit.core.lean.frozen import Frozen
from tunekit.core.lean.lycoris import drops_rows_alone, kept_rows


@attrs.define(eq=False)
class LeanLoKr(LeanForward):
    """y = W x + bias + scale * kron(C, B A) x.

    With x as a matrix X (i1, i2), kron(C, B A) x is C X A^T B^T, (o1, o2): A first, which makes X small, then C, then
    B. Where one full matrix (o2, i2) stands in for B A, it is A, and B the identity, which is left out.
    """

    parts = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_w2")

    def knows(self) -> bool:
        """No dropout of the whole update."""
        return self.adapter not in self.layer.lokr_t2 and drops_rows_alone(self.layer, self.adapter)

    def compute(self, x: Tensor) -> Tensor:
        """See `LeanForward.compute`."""
        layer, adapter = self.layer, self.adapter
        has_c, has_full = adapter in layer.lokr_w1, adapter in layer.lokr_w2
        c = layer.lokr_w1[adapter] if has_c else layer.lokr_w1_a[adapter] @ layer.lokr_w1_b[adapter]
        a = layer.lokr_w2[adapter] if has_full else layer.lokr_w2_b[adapter]
        b = None if has_full else layer.lokr_w2_a[adapter].to(x.dtype)
        kept = kept_rows(layer, adapter, x, layer.rank_dropout_scale[adapter])
        scaled = (c * layer.scaling[adapter]).to(x.dtype)
        found: Tensor = _Kronecker.apply(x, self.base.bias, scaled, a.to(x.dtype), b, self.base, kept)
        return found


class _Kronecker(torch.autograd.Function):  # type: ignore[misc]
    """y = W x + bias + kept * (kron(C, B A) x), added where y lies."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., i1 * i2)
        bias: Tensor | None,  # (o1 * o2)
        c: Tensor,  # (o1, i1)
        a: Tensor,  # (rank, i2)
        b: Tensor | None,  # (o2, rank); None for the identity
        base: Frozen,
        kept: Tensor | None,  # (o1 * o2)
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        first = _by_first(c, rows.reshape(-1, a.shape[1]) @ a.T)  # (tokens * o1, rank)
        y = linear(rows, base.weight(x.dtype), bias)
        flat = y.view(-1, a.shape[0] if b is None else b.shape[0])  # (tokens * o1, o2)
        if kept is None and b is not None:
            flat.addmm_(first, b.T)
        else:
            update = (first if b is None else first @ b.T).view_as(y)
            y.add_(update) if kept is None else y.addcmul_(update, kept)
        ctx.save_for_backward(rows, c, a, b, first, kept)
        ctx.base, ctx.shape = base, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, c, a, b, first, kept = ctx.saved_tensors
        of_y = gradient.reshape(-1, gradient.shape[-1])
        of_update = (of_y if kept is None else of_y * kept).reshape(-1, a.shape[0] if b is None else b.shape[0])
        of_b = None if b is None else of_update.T @ first
        of_first = of_update if b is None else of_update @ b  # (tokens * o1, rank)
        inputs = rows.reshape(-1, a.shape[1])  # (tokens * i1, i2)
        of_inner = _by_first(c.T, of_first)  # (tokens * i1, rank)
        of_a = of_inner.T @ inputs
        of_c = _sum_of_products(of_first, inputs @ a.T, *c.shape)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = of_y @ ctx.base.weight(of_y.dtype)
            of_x.view(-1, a.shape[1]).addmm_(of_inner, a)
            of_x = of_x.view(ctx.shape)
        of_bias = of_y.sum(0) if ctx.needs_input_grad[1] else None
        return of_x, of_bias, of_c, of_a, of_b, None, None


def _by_first(c: Tensor, inner: Tensor) -> Tensor:
    """C times each (i1, rank) of `inner` (tokens * i1, rank): (tokens * o1, rank)."""
    each = inner.view(-1, c.shape[1], inner.shape[1])
    return torch.bmm(c.expand(len(each), -1, -1), each).view(-1, inner.shape[1])


def _sum_of_products(left: Tensor, right: Tensor, outputs: int, inputs: int) -> Tensor:
    """The sum over tokens of (o1, rank) times (rank, i1), from (tokens * o1, rank) and (tokens * i1, rank)."""
    wide = left.view(-1, outputs, left.shape[1]).transpose(1, 2).reshape(-1, outputs)  # (tokens * rank, o1)
    return wide.T @ right.view(-1, inputs, right.shape[1]).transpose(1, 2).reshape(-1, inputs)
