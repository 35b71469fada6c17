"""AdaLoRA while training.

Only ever imported from inside of methods, since it imports torch.
"""

import attrs
from torch import Tensor

from tunekit.core.lean.forward import LeanForward
from tunekit.core.lean.lora import dropped, is_plain
from tunekit.core.lean.low_rank import low_rank


@attrs.define(eq=False)
class LeanAdaLoRA(LeanForward):
    """y = W x + bias + scale / rank * B diag(E) A x, the scale and E folded into A, which is small."""

    parts = ("lora_A", "lora_B", "lora_E")

    def knows(self) -> bool:
        """No dropout but torch's."""
        return is_plain(self.layer.lora_dropout[self.adapter])

    def compute(self, x: Tensor) -> Tensor:
        """See `LeanForward.compute`."""
        layer, adapter = self.layer, self.adapter
        a, b, e = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_E[adapter]
        scaled = a * (e * (layer.scaling[adapter] / (layer.ranknum[adapter] + 1e-5)))  # PEFT's divisor
        left = dropped(layer.lora_dropout[adapter], x, a.dtype)
        return low_rank(x, scaled.to(x.dtype), b.to(x.dtype), self.base, 1.0, bias=self.base.bias, dropped=left)
