"""IA3: scaling activations by learned vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from tunekit.core.component import Context
from tunekit.core.model.peft_method import PeftMethod
from tunekit.core.model.targets import linear_layers, select, shorten
from tunekit.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


@attrs.frozen(kw_only=True)
class IA3(PeftMethod):
    """Infused adapter by inhibiting and amplifying inner activations: one learned factor for each feature.

    An attention layer's output W @ x becomes l * (W @ x), with l of shape (out_features,); a feed-forward layer's
    becomes W @ (l * x), with l of shape (in_features,). Every l starts at one, so the model starts as its base. One
    parameter a feature, and no rank: the fewest parameters of all methods, for which it needs ten times LoRA's learning
    rate and more. Liu et al. 2022, https://arxiv.org/abs/2205.05638.

    In 90 steps on `tunekit.ORDERS` the held-out loss of `tunekit.TINY` falls from 7.18 to 7.02 at 2e-4, to 5.10 at
    3e-3, which is the paper's, to 2.69 at 1e-2, the method's own, and to 0.75 at 3e-2 (LoRA at 2e-4: 2.40).

    Args:
        targets: what is scaled: "all-linear", "attention", "mlp", names of modules, or a regular expression for the
            whole name of linear layers; None for those that PEFT lists for the architecture: two projections of the
            attention and the second feed-forward layer, as in the paper.
        feedforward_targets: those of the targets whose input is scaled, not the output, said in the same ways; None
            for those that PEFT lists if `targets` is None, else those that lie in the feed-forward block.
    """

    name = "ia3"
    supports = frozenset({"nf4", "int8"})
    learning_rate = 1e-2

    targets: str | tuple[str, ...] | None = None
    feedforward_targets: str | tuple[str, ...] | None = None

    def peft_config(self, context: Context) -> PeftConfig:
        """PEFT's IA3Config."""
        from peft import IA3Config

        return IA3Config(task_type="CAUSAL_LM", target_modules=self.targets)

    def place(self, config: PeftConfig, model: PreTrainedModel) -> None:
        """Find the targets, and which of them are scaled on the side of their input."""
        from peft.utils import constants

        feedforward = self.feedforward_targets
        if config.target_modules is None:
            kind = model.config.model_type
            listed = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind)
            if listed is None:
                last = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
                raise ConfigError(
                    f"PEFT lists no layers for the architecture {kind!r}; name those that make keys and values, "
                    f"and the second feed-forward layer, out of {', '.join(last)}",
                    "IA3.targets",
                )
            config.target_modules = list(listed)
            if feedforward is None:
                feedforward = tuple(constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[kind])
        scaled = select(model, config.target_modules, "IA3.targets")
        super().place(config, model)
        if feedforward is None:
            by_input = [name for name in _lying_in_mlp(model) if name in scaled]
        else:
            by_input = select(model, feedforward, "IA3.feedforward_targets") if feedforward else []
        if stray := sorted(set(by_input) - set(scaled)):
            raise ConfigError(f"{stray[0]} is not among the targets; add it to them", "IA3.feedforward_targets")
        short = shorten(by_input, model)
        # PEFT compares ends without the dot: "o" would be found in "wo".
        exact = [name for name in scaled if name.endswith(tuple(short))] == by_input
        config.feedforward_modules = short if exact else sorted(by_input)


def _lying_in_mlp(model: PreTrainedModel) -> list[str]:
    try:
        return select(model, "mlp")
    except ConfigError:  # an architecture without a block of that name
        return []
