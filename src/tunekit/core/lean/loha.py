"""LoHa while training: as LoRA of the squared rank, or with one multiplication by the sum of weight and update.

Only ever imported from inside of methods, since it imports torch.
"""

from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.functional import linear

from tunekit.core.lean.forward import LeanForward
from tunekit.core.lean.frozen import Frozen
from tunekit.core.lean.low_rank import multiplied
from tunekit.core.lean.lycoris import drops_rows_alone, kept_rows


@attrs.define(eq=False)
class LeanLoHa(LeanForward):
    """y = W x + bias + scale * ((B1 A1) o (B2 A2)) x, where o multiplies element by element.

    Row by row, (b1 A1) o (b2 A2) is the Kronecker product of b1 and b2 times all products of a row of A1 and a row of
    A2: a matrix of rank rank**2, which is multiplied as LoRA's is. Where that is more work than the update in full, the
    update is added to W, and both are multiplied at once.
    """

    parts = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

    def knows(self) -> bool:
        """No dropout of the whole update."""
        return self.adapter not in self.layer.hada_t1 and drops_rows_alone(self.layer, self.adapter)

    def takes(self, dtype: torch.dtype) -> bool:
        """As the base does, but no sum of W and update in half precision, which would round the update away."""
        return super().takes(dtype) and (self._is_low_rank or dtype.itemsize >= 4)

    @property
    def _is_low_rank(self) -> bool:
        inputs, outputs = self.layer.in_features, self.layer.out_features
        return bool(2 * self.layer.r[self.adapter] ** 2 * (inputs + outputs) < inputs * outputs)

    def compute(self, x: Tensor) -> Tensor:
        """See `LeanForward.compute`."""
        # PEFT calls B1 "w1_a", which is (out_features, rank), and A1 "w1_b", (rank, in_features).
        b1, a1, b2, a2 = self.tensors()
        scale, kept = float(self.layer.scaling[self.adapter]), kept_rows(self.layer, self.adapter, b1, scaled=True)
        if kept is not None:
            b1 = b1 * kept[:, None]
        way = _SquaredRank if self._is_low_rank else _SummedWeight
        found: Tensor = way.apply(x, self.base.bias, b1, a1, b2, a2, self.base, scale)
        return found


class _SquaredRank(torch.autograd.Function):  # type: ignore[misc]
    """y = W x + bias + scale * B A x, with A the products of a row of A1 and one of A2, and B those of B1 and B2."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., in_features)
        bias: Tensor | None,  # (out_features)
        b1: Tensor,  # (out_features, rank)
        a1: Tensor,  # (rank, in_features)
        b2: Tensor,
        a2: Tensor,
        base: Frozen,
        scale: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (tokens, in_features)
        a = _products(a1, a2).to(x.dtype)  # (rank**2, in_features)
        # Transposed, since products of whole rows are quick, and the scale on the smallest of it.
        b = _products(b1.T * scale, b2.T.contiguous()).to(x.dtype)  # (rank**2, out_features)
        y, inner = multiplied(rows, rows, a, b.T, base, 1.0, bias)
        ctx.save_for_backward(rows, inner, a, b, b1, a1, b2, a2)
        ctx.base, ctx.scale, ctx.shape = base, scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, inner, a, b, b1, a1, b2, a2 = ctx.saved_tensors
        of_y = gradient.reshape(-1, gradient.shape[-1])  # (tokens, out_features)
        of_inner = of_y @ b.T  # (tokens, rank**2)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (of_y @ ctx.base.weight(of_y.dtype)).addmm_(of_inner, a).view(ctx.shape)
        of_bias = of_y.sum(0) if ctx.needs_input_grad[1] else None
        of_a1, of_a2 = _of_factors((of_inner.T @ rows).to(a1.dtype), a1, a2)
        of_b1, of_b2 = _of_factors((inner.T @ of_y).to(b1.dtype), b1.T * ctx.scale, b2.T.contiguous())
        return of_x, of_bias, of_b1.T * ctx.scale, of_a1, of_b2.T, of_a2, None, None


def _products(first: Tensor, second: Tensor) -> Tensor:
    """Each row of `first` (rank, features) times each of `second`, element by element: (rank**2, features)."""
    return (first[:, None] * second).flatten(0, 1)


def _of_factors(of_products: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `first` and `second` from that of their products, (rank**2, features)."""
    each = of_products.view(len(first), len(second), -1)
    return (each * second).sum(1), (each * first[:, None]).sum(0)


class _SummedWeight(torch.autograd.Function):  # type: ignore[misc]
    """y = (W + scale * (B1 A1) o (B2 A2)) x + bias; nothing as large as W is held until the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., in_features)
        bias: Tensor | None,  # (out_features)
        b1: Tensor,  # (out_features, rank)
        a1: Tensor,  # (rank, in_features)
        b2: Tensor,
        a2: Tensor,
        base: Frozen,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x, b1, a1, b2, a2)
        ctx.base, ctx.scale = base, scale
        return linear(x, torch.addcmul(base.weight(x.dtype), b1 @ a1, b2 @ a2, value=scale), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, b1, a1, b2, a2 = ctx.saved_tensors
        first, second = b1 @ a1, b2 @ a2
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ torch.addcmul(ctx.base.weight(gradient.dtype), first, second, value=ctx.scale)
        of_y = gradient.reshape(-1, gradient.shape[-1])  # (tokens, out_features)
        of_weight = (of_y.T @ x.reshape(-1, x.shape[-1])).mul_(ctx.scale)  # (out_features, in_features)
        of_first, of_second = second.mul_(of_weight), first.mul_(of_weight)
        of_bias = of_y.sum(0) if ctx.needs_input_grad[1] else None
        return of_x, of_bias, of_first @ a1.T, b1.T @ of_first, of_second @ a2.T, b2.T @ of_second, None, None
