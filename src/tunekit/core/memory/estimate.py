"""Memory by the formulas of the literature, from a few numbers of a model: rough, and there at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MIXED_ADAMW = {"weights": 2, "gradients": 4, "optimizer": 12}
"""Bytes a trained parameter takes in mixed precision: itself in 16 bits, its gradient in float32, and in float32 its
master copy and AdamW's two moments. Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 3.1, with
gradients in float32."""
SAFETY = 8
"""Run for run, the formulas are right within a factor of 2 or so; so far the need of a run must be from its budget for
`is_roomy` to rely on them. One factor of 2 of it is for float32, for which they are not made."""

Kept = Literal["all", "selective", "layer inputs"]


def activation_bytes(*, rows: int, length: int, hidden: int, heads: int, layers: int, kept: Kept = "all") -> int:
    """Bytes that the layers of a transformer keep for the backward pass in 16 bits, attention scores included.

    Per layer rows * length * hidden * (34 + 5 * heads * length / hidden); 34 without the scores ("selective"), 2 where
    the input of a layer alone is kept. Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, equations 2 to 6.

    Args:
        rows: in one forward pass.
        length: tokens of each.
        hidden: numbers a token is in the model.
        heads: attention heads.
        layers: of the model.
        kept: what of them is kept.
    """
    tokens = rows * length * layers
    scores = 5 * heads * length * tokens if kept == "all" else 0
    return tokens * hidden * (2 if kept == "layer inputs" else 34) + scores


def is_roomy(config: PretrainedConfig, tokens: int, longest: int, batch: int, budget: int) -> bool:
    """Whether a training step is so far below `budget` bytes that nothing needs to be counted; False where unsure.

    Args:
        config: of the model.
        tokens: the most in a forward pass.
        longest: tokens of the longest row.
        batch: rows of a step.
        budget: bytes there are.
    """
    text = config.get_text_config()
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    hidden, heads, layers, vocabulary = (getattr(text, name, None) for name in names)
    if not (hidden and heads and layers and vocabulary):
        return False
    wide = getattr(text, "intermediate_size", None) or 4 * hidden
    experts = max(
        (value for name, value in text.to_dict().items() if "experts" in name and type(value) is int), default=1
    )
    parameters = layers * hidden * (4 * hidden + 3 * wide * max(experts, 1)) + 2 * vocabulary * hidden
    together = min(max(tokens, longest), batch * longest)
    activations = activation_bytes(
        rows=-(-together // longest), length=longest, hidden=hidden, heads=heads, layers=layers
    )
    logits = 4 * together * vocabulary
    needed: float = SAFETY * (activations + logits) + parameters * (4 + sum(MIXED_ADAMW.values()))
    return needed < budget
