"""A frozen linear layer and a product of two low-rank matrices, in one: what LoRA and its kin come down to.

Only ever imported from inside of methods, since it imports torch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from tunekit.core.lean.frozen import Frozen


def low_rank(
    x: Tensor, a: Tensor, b: Tensor, base: Frozen, scale: float, *, bias: Tensor | None, dropped: Tensor | None = None
) -> Tensor:
    """W x + bias + scale * B A x, or scale * B A dropped: (..., out_features).

    PEFT makes the product, scales it and adds it, each in a pass over all of the output; here it is added where the
    output lies. So is the gradient of x through A to that through W.

    Args:
        x: (..., in_features).
        a: (rank, in_features).
        b: (out_features, rank).
        base: what has W.
        scale: of the product.
        bias: (out_features).
        dropped: what dropout has left of x; None for all of it.
    """
    found: Tensor = _LowRank.apply(x, dropped, bias, a, b, base, scale)
    return found


def multiplied(
    rows: Tensor, source: Tensor, a: Tensor, b: Tensor, base: Frozen, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """W rows + bias + scale * B A source, (tokens, out_features), and A source, (tokens, rank); keeps no graph.

    `rows` and `source` are (tokens, in_features), and one and the same where nothing is dropped.
    """
    inner = source @ a.T
    return linear(rows, base.weight(rows.dtype), bias).addmm_(inner, b.T, alpha=scale), inner


class _LowRank(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., in_features)
        dropped: Tensor | None,  # of the same shape; None for x itself
        bias: Tensor | None,  # (out_features)
        a: Tensor,  # (rank, in_features)
        b: Tensor,  # (out_features, rank)
        base: Frozen,
        scale: float,
    ) -> Tensor:
        source = (x if dropped is None else dropped).reshape(-1, x.shape[-1])  # (tokens, in_features)
        y, inner = multiplied(x.reshape(-1, x.shape[-1]), source, a, b, base, scale, bias)
        ctx.save_for_backward(source, inner, a, b)
        ctx.base, ctx.scale, ctx.shape, ctx.drops = base, scale, x.shape, dropped is not None
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        source, inner, a, b = ctx.saved_tensors
        needs_x, needs_dropped, needs_bias, *_ = ctx.needs_input_grad
        of_y = gradient.reshape(-1, gradient.shape[-1])  # (tokens, out_features)
        of_inner = (of_y @ b).mul_(ctx.scale)  # (tokens, rank)
        of_a, of_b = of_inner.T @ source, (of_y.T @ inner).mul_(ctx.scale)
        of_x = of_y @ ctx.base.weight(of_y.dtype) if needs_x else None
        of_dropped = None
        if ctx.drops:
            of_dropped = (of_inner @ a).view(ctx.shape) if needs_dropped else None
        elif of_x is not None:
            of_x.addmm_(of_inner, a)
        of_bias = of_y.sum(0) if needs_bias else None
        return None if of_x is None else of_x.view(ctx.shape), of_dropped, of_bias, of_a, of_b, None, None
