"""LoRA: low-rank adaptation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import attrs

from tunekit.core.component import Context
from tunekit.core.fields import at_least, between
from tunekit.core.peft_method import PeftMethod

if TYPE_CHECKING:
    from peft import PeftConfig


@attrs.frozen(kw_only=True)
class LoRA(PeftMethod):
    """Low-rank adaptation: each chosen weight W becomes W + (alpha / rank) * B @ A, and only A and B are trained.

    A has shape (rank, in_features), B (out_features, rank) and starts at zero, so the model starts as its base.
    Hu et al. 2021, https://arxiv.org/abs/2106.09685.

    Args:
        rank: rank of the update; parameters grow with it.
        alpha: scale of the update, divided by the rank; None means twice the rank.
        dropout: probability of dropping an input of A while training.
        targets: "all-linear" (every linear layer but the output head), or names of modules.
        bias: which biases are trained besides: "none", "all", or those of the targets ("lora_only").
        variant: "standard"; "rslora" divides alpha by the root of the rank (Kalajdzievski 2023); "dora" trains
            magnitude and direction apart (Liu et al. 2024).
        layers: numbers of the layers to adapt, from 0; None for all.
        trained_modules: names of modules trained whole and saved with the adapter, such as a head.
    """

    name = "lora"
    supports = frozenset({"nf4", "int8"})

    rank: int = attrs.field(default=16, validator=at_least(1))
    alpha: float | None = attrs.field(default=None, validator=at_least(0))
    dropout: float = attrs.field(default=0.0, validator=between(0, 1))
    targets: str | tuple[str, ...] = "all-linear"
    bias: Literal["none", "all", "lora_only"] = "none"
    variant: Literal["standard", "rslora", "dora"] = "standard"
    layers: tuple[int, ...] | None = None
    trained_modules: tuple[str, ...] = ()

    def peft_config(self, context: Context) -> PeftConfig:
        """PEFT's LoraConfig."""
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets),
            bias=self.bias,
            use_rslora=self.variant == "rslora",
            use_dora=self.variant == "dora",
            layers_to_transform=None if self.layers is None else list(self.layers),
            modules_to_save=list(self.trained_modules) or None,
        )
