"""IA3 while training.

Only ever imported from inside of methods, since it imports torch.
"""

import attrs
import torch
from torch import Tensor

from tunekit.core.lean.forward import LeanForward
from tunekit.core.lean.frozen import frozen_linear


@attrs.define(eq=False)
class LeanIA3(LeanForward):
    """l * (W x + bias), or W (l * x) + bias where the input is scaled; without a detour by float32 for a bfloat16 x."""

    parts = ("ia3_l",)

    def knows(self) -> bool:
        """There is nothing else to it."""
        return True

    def compute(self, x: Tensor) -> Tensor:
        """See `LeanForward.compute`."""
        # Less one: in half precision a factor near it is rounded by more than it is away, the same for every token.
        beyond = (self.layer.ia3_l[self.adapter].flatten() - 1).to(x.dtype)
        if self.layer.is_feedforward:
            x = torch.addcmul(x, x, beyond)
        y = frozen_linear(x, self.base)
        return y if self.layer.is_feedforward else torch.addcmul(y, y, beyond)
