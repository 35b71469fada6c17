"""A tiny model and tokenizer, built in memory: no network, no files, and the same on every call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}"
)
SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


def tiny_tokenizer(
    *, template: str | None = CHATML, begin: bool = False, end: str = "<|im_end|>", pad: str = "<pad>"
) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer: 256 bytes and five special tokens, so that any text survives encoding and decoding.

    Args:
        template: the chat template; None for a tokenizer without one.
        begin: whether `tokenizer(text)` puts the BOS token `<s>` first.
        end: the end-of-sequence token.
        pad: the pad token; equal to `end` for the tokenizers that share them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    if begin:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=end, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(architecture: str = "llama", *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A two-layer causal language model with random weights over the vocabulary of `tiny_tokenizer`, in float32.

    Args:
        architecture: "llama" (rotary positions, gated MLP) or "gpt2" (absolute positions, Conv1D, biases, tied head).
        seed: of its weights.
        config: fields of the architecture's configuration to set otherwise.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    common = {"vocab_size": 261, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 4}
    with torch.random.fork_rng(devices=[]):  # it is made on the CPU, and no other device's numbers are drawn
        torch.default_generator.manual_seed(seed)
        if architecture == "llama":
            shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            more = {"num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False}
            return LlamaForCausalLM(LlamaConfig(**{**common, **shape, **more, **config}))
        if architecture == "gpt2":
            shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
            return GPT2LMHeadModel(GPT2Config(**{**common, **shape, **config}))
    raise ValueError(f"unknown architecture {architecture!r}; there are 'llama' and 'gpt2'")
