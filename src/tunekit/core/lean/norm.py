"""RMS normalization with a frozen weight: half the passes over memory, and no float32 copy kept in half precision.

Only ever imported from inside of methods, since it imports torch.
"""

from typing import Any

import attrs
import torch
from torch import Tensor, nn

from tunekit.core.lean.forward import is_cast
from tunekit.core.model.hooks import is_hooked


@attrs.define(eq=False)
class LeanNorm:
    """The forward of such a module: w * x / rms(x), rounded as Llama's.

    Autograd goes back through each of its operations, with passes over the activations for every one, and in half
    precision keeps x in float32 for them. Taken together they need half the passes, and x as it is.

    Args:
        module: the normalization.
    """

    module: Any

    def __call__(self, x: Tensor) -> Tensor:
        """What the module's own forward gives."""
        weight = self.module.weight
        if is_cast(x) or weight.requires_grad or weight.dtype is not x.dtype:
            found: Tensor = type(self.module).forward(self.module, x)
            return found
        found = _Normalized.apply(x, weight, self.module.variance_epsilon)
        return found


def norm(module: nn.Module) -> LeanNorm | None:
    """The lean forward of `module`; None where it does not do what Llama's normalization does.

    Transformers has a copy of that in most of its models. Whether the code is the same is looked at, and no name:
    others of such a name add one to the weight, or take another mean.
    """
    weight = getattr(module, "weight", None)
    frozen = isinstance(weight, nn.Parameter) and weight.dim() == 1 and not weight.requires_grad
    if not (frozen and hasattr(module, "variance_epsilon")) or "forward" in vars(module) or is_hooked(module):
        return None
    from transformers.models.llama.modeling_llama import LlamaRMSNorm  # not for models that have nothing of the kind

    return LeanNorm(module) if _code(type(module)) == _code(LlamaRMSNorm) else None


def _code(kind: type[nn.Module]) -> tuple[Any, ...]:
    """What the forward of a module does: what it computes, with which names and constants, its docstring aside."""
    code = getattr(kind.forward, "__code__", None)
    if code is None:
        return (kind,)
    constants = [constant for constant in code.co_consts if constant not in (None, kind.forward.__doc__)]
    return (code.co_code, code.co_names, *constants)


class _Normalized(torch.autograd.Function):  # type: ignore[misc]
    """y = weight * x / sqrt(mean(x**2) + epsilon), in float32 but for the last product; the weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        full = x.float()  # (..., features)
        over = full.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()  # as Llama's, to the last bit
        ctx.save_for_backward(x, weight, over)
        return weight * (full * over).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, over = ctx.saved_tensors
        full, of_normal = x.float(), (gradient * weight).float()
        # d(x / rms) = (dx - x * (x . dx) / (features * rms**2)) / rms
        across = (of_normal * full).sum(-1, keepdim=True).mul_(over**3).div_(-x.shape[-1])
        return of_normal.mul_(over).addcmul_(full, across).to(x.dtype), None, None
