"""`LeanForward`: what stands in for the forward of one of PEFT's layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tunekit.core.lean.frozen import Frozen


@attrs.define(eq=False)
class LeanForward(ABC):
    """The forward of one layer while training; calling it is what the layer does.

    Args:
        layer: PEFT's layer, with exactly one adapter, which is active.
        adapter: its name.
        base: what it adapts.
    """

    layer: Any
    adapter: str
    base: Frozen

    parts: ClassVar[tuple[str, ...]]
    """Names of the layer's dictionaries of trained tensors, one of which has an entry for the adapter at least."""

    @abstractmethod
    def knows(self) -> bool:
        """Whether this is all that the layer does: nothing in its configuration is passed over."""

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """The layer's output (..., out_features) for x (..., in_features)."""

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether it can be computed on activations of `dtype`. Default: if the base multiplies them as they are."""
        return self.base.takes(dtype)

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """What PEFT's forward gives, and by that where there is more to do than this knows."""
        if args or options or not self.knows_now(x):
            found: Tensor = type(self.layer).forward(self.layer, x, *args, **options)
            return found
        return self.compute(x)

    def knows_now(self, x: Tensor) -> bool:
        """Whether the layer does with `x`, as things are, what `compute` does."""
        return not (self.layer.disable_adapters or self.layer.merged or is_cast(x)) and self.takes(x.dtype)

    def tensors(self) -> list[Tensor]:
        """The adapter's trained tensors."""
        tables = [getattr(self.layer, part) for part in self.parts]
        found = [table[self.adapter] for table in tables if self.adapter in table]
        return [getattr(one, "weight", one) for one in found]


def is_cast(x: Tensor) -> bool:
    """Whether torch casts what is computed on `x`, as things are."""
    import torch

    return not x.is_meta and torch.is_autocast_enabled(x.device.type)  # the meta device knows no autocast
