"""LoRA, rsLoRA, PiSSA and DoRA while training.

Only ever imported from inside of methods, since it imports torch.
"""

from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunekit.core.lean.forward import LeanForward
from tunekit.core.lean.frozen import frozen_linear
from tunekit.core.lean.low_rank import low_rank


@attrs.define(eq=False)
class LeanLoRA(LeanForward):
    """y = W x + bias + scale * B A x; rsLoRA has another scale, PiSSA another W."""

    parts: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    def knows(self) -> bool:
        """No variant, no bias of B, and no dropout but torch's."""
        return self.adapter not in self.layer.lora_variant and self._knows()

    def compute(self, x: Tensor) -> Tensor:
        """See `LeanForward.compute`."""
        a, b = self.factors(x.dtype)
        return low_rank(x, a, b, self.base, self.scale, bias=self.base.bias, dropped=self._dropped(x))

    @property
    def scale(self) -> float:
        """What the product of B and A is multiplied with."""
        return float(self.layer.scaling[self.adapter])

    @property
    def drops(self) -> bool:
        """Whether some of x is dropped at random, as things are."""
        return bool(self._dropout.training) and type(self._dropout) is not nn.Identity

    @property
    def _dropout(self) -> nn.Module:
        found: nn.Module = self.layer.lora_dropout[self.adapter]
        return found

    def _knows(self) -> bool:
        return not self.layer.lora_bias[self.adapter] and is_plain(self._dropout)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B in the dtype that is multiplied in; their gradients come back in their own."""
        layer, adapter = self.layer, self.adapter
        return layer.lora_A[adapter].weight.to(dtype), layer.lora_B[adapter].weight.to(dtype)

    def _dropped(self, x: Tensor) -> Tensor | None:
        return dropped(self._dropout, x, self.layer.lora_A[self.adapter].weight.dtype)


@attrs.define(eq=False)
class LeanDoRA(LeanLoRA):
    """y = bias + c * (W + scale * B A) x, where c is the magnitude over the norm of each row of W + scale * B A.

    The norm counts as a constant in the backward pass (section 4.3 of the paper, https://arxiv.org/abs/2402.09353).
    PEFT makes W + scale * B A to take its rows' norms; here they come from |w + s v|^2 = |w|^2 + 2 s w.v + s^2 |v|^2,
    the first of which stays, with v = b A for the row b of B.
    """

    parts = ("lora_A", "lora_B", "lora_magnitude_vector")
    _squares: Tensor | None = None

    def knows(self) -> bool:
        """DoRA alone: no other variant."""
        from peft.tuners.lora.variants import DoraLinearVariant

        return type(self.layer.lora_variant.get(self.adapter)) is DoraLinearVariant and self._knows()

    def compute(self, x: Tensor) -> Tensor:
        """See `LeanForward.compute`."""
        a, b = self.factors(x.dtype)
        magnitude = self.layer.lora_magnitude_vector[self.adapter].weight
        # Less one: in half precision a factor near it is rounded by more than it is away, the same for every token.
        beyond = (magnitude / self._norms(a, b) - 1).to(x.dtype)  # (out_features)
        bias, dropped = self.base.bias, self._dropped(x)
        product = low_rank(x if dropped is None else dropped, a, b, self.base, self.scale, bias=None)
        if dropped is None:
            return torch.addcmul(product if bias is None else product + bias, product, beyond)
        # What is dropped for the adapter is not for the base: W x + bias - W dropped + c * product.
        return torch.addcmul(frozen_linear(x - dropped, self.base) + product, product, beyond)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _norms(self, a: Tensor, b: Tensor) -> Tensor:
        """Of the rows of W + scale * B A, in float32 at least: (out_features)."""
        weight, dtype = self.base.weight(a.dtype), torch.promote_types(a.dtype, torch.float32)
        if self._squares is None:
            self._squares = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square_()
        across = (weight @ a.T).to(dtype)
        a, b = a.to(dtype), b.to(dtype)
        across = (across * b).sum(1)
        own = ((b @ (a @ a.T)) * b).sum(1)
        return (self._squares + 2 * self.scale * across + self.scale**2 * own).sqrt_()


def is_plain(dropout: nn.Module) -> bool:
    """Whether it is no dropout, or that of torch."""
    return type(dropout) in (nn.Identity, nn.Dropout)


def dropped(dropout: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What is left of `x` while training, None for all of it; the random numbers are those that PEFT draws."""
    if type(dropout) is nn.Identity or not dropout.training:
        return None
    # In another dtype a GPU would draw other numbers.
    found: Tensor = dropout(x.to(dtype)).to(x.dtype)
    return found
