"""Tiny models of families in which rows laid end to end change each other, and of families in which they do not."""

import transformers
from transformers import AutoConfig

from tunekit.core.common.distributions import release

VOCABULARY = 100
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOWED = {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

LEAKING = {
    "qwen3_5_text": LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
        **SSM,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "block_size": 16},
}
LEAKING_TOO = {
    "bamba": {"attn_layer_indices": [1], **SSM},
    "falcon_h1": {"mamba_d_ssm": 64, "head_dim": 8, **SSM},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, **EXPERTS},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "olmo_hybrid": LINEAR,
    "qwen3_5_moe_text": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_next": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16, "head_dim": 8},
}
APART = {
    "llama": {},
    "qwen2": {},
    "gemma2": WINDOWED,
    "gemma3_text": WINDOWED,
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
}
if release(transformers.__version__) < (5, 23):  # its attention has no soft caps there, so rows are padded
    del APART["gemma2"]


def family(kind):
    """The tiny configuration of a family of `LEAKING`, `LEAKING_TOO` or `APART`."""
    return AutoConfig.for_model(kind, **{**SIZE, **(LEAKING | LEAKING_TOO | APART)[kind]})
