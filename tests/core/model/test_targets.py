"""Targets find, on every family of models, the layers that a person would name; the head is never among them."""

import pytest

import tunekit as tk
from tunekit.core.model import targets
from tunekit.testing import tiny_model

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
GATED = ["down_proj", "gate_proj", "up_proj"]
QKVO = ["k_proj", "o_proj", "q_proj", "v_proj"]
FAMILIES = {
    "Llama": (SMALL | {"intermediate_size": 64}, QKVO, GATED),
    "Mistral": (SMALL | {"intermediate_size": 64, "num_key_value_heads": 2}, QKVO, GATED),
    "Qwen2": (SMALL | {"intermediate_size": 64, "num_key_value_heads": 2}, QKVO, GATED),
    "Gemma": (SMALL | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}, QKVO, GATED),
    "Qwen3": (SMALL | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16}, QKVO, GATED),
    "Gemma2": (SMALL | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}, QKVO, GATED),
    "Phi3": (
        SMALL | {"intermediate_size": 64, "pad_token_id": 0},
        ["o_proj", "qkv_proj"],
        ["down_proj", "gate_up_proj"],
    ),
    "Phi": (SMALL | {"intermediate_size": 64}, ["dense", "k_proj", "q_proj", "v_proj"], ["fc1", "fc2"]),
    "GPT2": (
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97},
        ["attn.c_proj", "c_attn"],
        ["c_fc", "mlp.c_proj"],
    ),
    "OPT": (
        SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32},
        ["k_proj", "out_proj", "q_proj", "v_proj"],
        ["fc1", "fc2"],
    ),
    "Bloom": (
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97},
        ["dense", "query_key_value"],
        ["dense_4h_to_h", "dense_h_to_4h"],
    ),
}
ENCODERS = {
    "T5ForConditionalGeneration": (
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 97},
        ["k", "o", "q", "v"],
        ["wi", "wo"],
    ),
    "BertForMaskedLM": (
        SMALL | {"intermediate_size": 64},
        ["attention.output.dense", "key", "query", "value"],
        ["0.output.dense", "1.output.dense", "intermediate.dense"],
    ),
    "BertForSequenceClassification": (
        SMALL | {"intermediate_size": 64},
        ["attention.output.dense", "key", "query", "value"],
        ["0.output.dense", "1.output.dense", "intermediate.dense"],
    ),
}


def build(family):
    """A tiny model of a family, without weights."""
    import torch
    import transformers

    config, *_ = (FAMILIES | ENCODERS)[family]
    name, _, _ = family.partition("For")
    cls = getattr(
        transformers, family if "For" in family else "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    )
    with torch.device("meta"):
        return cls(getattr(transformers, f"{name}Config")(**config))


def found(model, chosen):
    return targets.shorten(targets.select(model, chosen), model)


@pytest.mark.parametrize("family", FAMILIES | ENCODERS)
def test_attention_and_mlp_are_what_a_person_would_name(family):
    model = build(family)
    _, attention, mlp = (FAMILIES | ENCODERS)[family]
    assert found(model, "attention") == attention
    assert found(model, "mlp") == mlp


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_both_and_nothing_of_the_head(family):
    model = build(family)
    both = {*targets.select(model, "attention"), *targets.select(model, "mlp")}
    assert set(targets.select(model, "all-linear")) == both
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    assert head in targets.linear_layers(model)
    assert set(targets.linear_layers(model)) - both == {head}


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_finds_the_same_layers_by_all_linear(family):
    from peft import LoraConfig, get_peft_model

    def adapted(model):
        return {name for name, module in model.named_modules() if hasattr(module, "lora_A")}

    theirs = get_peft_model(build(family), LoraConfig(target_modules="all-linear", fan_in_fan_out=family == "GPT2"))
    ours = tk.LoRA().attach(build(family), tk.Context(model_id="a/b"))
    assert adapted(ours) == adapted(theirs)
    assert adapted(ours)


@pytest.mark.parametrize(
    "chosen", ["attention", "mlp", ("c_proj",), ("attn.c_proj",), r".*h\.1\..*", ("transformer.h.0.attn.c_attn",)]
)
def test_shortened_names_select_exactly_the_same_modules(chosen):
    model = build("GPT2")
    full = targets.select(model, chosen)
    assert targets.select(model, targets.shorten(full, model)) == full


def test_an_expression_matches_whole_names_of_linear_layers_and_never_the_head():
    model = build("Llama")
    assert targets.select(model, r"model\.layers\.1\.mlp\.(up|down)_proj") == [
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert targets.select(model, ".*") == targets.select(model, "all-linear")
    with pytest.raises(tk.ConfigError, match="matches only the output head"):
        targets.select(model, "lm_head")


@pytest.mark.parametrize(
    ("family", "head"), [("BertForSequenceClassification", "classifier"), ("BertForMaskedLM", "cls.predictions")]
)
def test_the_head_of_another_task_is_a_head(family, head):
    model = build(family)
    assert any(head in name for name in targets.linear_layers(model))
    assert not any(head in name for name in targets.select(model, "all-linear"))


def test_a_head_is_adapted_where_it_is_named():
    assert targets.select(build("Llama"), ("lm_head",)) == ["lm_head"]


def test_a_name_ends_at_a_dot():
    assert "model.layers.0.self_attn.o_proj" in targets.select(build("Llama"), ("o_proj",))
    with pytest.raises(tk.ConfigError, match="no module is named 'proj'"):
        targets.select(build("Llama"), ("proj",))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (("q_proj", "w_proj"), r"LoRA\.targets: no module is named 'w_proj'; did you mean '._proj'"),
        (("q_proj", "nope"), "no module is named 'nope'; known: down_proj, embed_tokens, gate_proj"),
        ((), "names no module"),
        ("q_proj", r'matches the whole name of no linear layer; for every module of this name, write \("q_proj",\)'),
        ("al-linear", "its linear layers are down_proj, gate_proj, k_proj, lm_head"),
        ("*proj", "no regular expression"),
        (("self_attn",), "no module is named 'self_attn'"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_that_says_what_there_is(chosen, message):
    with pytest.raises(tk.ConfigError, match=message):
        tk.LoRA(targets=chosen).attach(tiny_model(), tk.Context(model_id="a/b"))


def test_an_architecture_without_the_usual_names_lists_those_it_has():
    from torch import nn

    odd = nn.ModuleDict({"mixer": nn.ModuleDict({"left": nn.Linear(2, 2), "right": nn.Linear(2, 2)})})
    assert targets.select(odd, "all-linear") == ["mixer.left", "mixer.right"]
    with pytest.raises(
        tk.ConfigError, match="cannot tell which layers of ModuleDict are 'mlp'; its linear layers are left, right"
    ):
        targets.select(odd, "mlp")


def test_layers_are_counted_from_zero_and_must_be_there():
    names = targets.select(build("GPT2"), "attention")
    assert targets.of_layers(names, (1,)) == ["transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj"]
    with pytest.raises(tk.ConfigError, match="no layer with targets has the number 2; they are numbered 0 to 1"):
        targets.of_layers(names, (0, 2))


@pytest.mark.parametrize(
    "method",
    [
        tk.LoRA(targets=("lm_head",)),
        tk.LoRA(targets=("embed_tokens",)),
        tk.IA3(targets=("lm_head",)),
        tk.LoRA(trained_modules=("lm_head",)),
    ],
)
def test_one_end_of_a_tied_model_is_refused(method):
    untied = method.attach(tiny_model(), tk.Context(model_id="a/b"))
    assert untied is not None
    with pytest.raises(tk.ConfigError, match="shares its weight with the other end"):
        method.attach(tiny_model(tie_word_embeddings=True), tk.Context(model_id="a/b"))


def test_a_module_to_be_trained_whole_must_be_there():
    with pytest.raises(
        tk.ConfigError, match=r"LoRA\.trained_modules: no module is named 'head'; did you mean 'lm_head'"
    ):
        tk.LoRA(trained_modules=("head",)).attach(tiny_model(), tk.Context(model_id="a/b"))


# Experts -------------------------------------------------------------------------------------------------------------

EXPERTS = {
    "Mixtral": SMALL | {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4},
    "Qwen2Moe": SMALL | {"num_key_value_heads": 2, "num_experts": 4, "shared_expert_intermediate_size": 16},
}


def experts(family):
    import torch
    import transformers

    with torch.device("meta"):
        config = getattr(transformers, f"{family}Config")(**EXPERTS[family])
        return getattr(transformers, f"{family}ForCausalLM")(config)


def test_experts_in_one_tensor_are_said_to_be_left_as_they_are():
    with pytest.warns(UserWarning, match="'all-linear' leaves the experts as they are: down_proj, gate_up_proj of the"):
        assert found(experts("Mixtral"), "all-linear") == QKVO
    assert found(experts("Mixtral"), "attention") == QKVO
    with pytest.warns(UserWarning, match="'mlp' leaves the experts as they are"):
        names = found(experts("Qwen2Moe"), "mlp")
    assert names == sorted([*GATED, "shared_expert_gate"])


@pytest.mark.parametrize("chosen", ["mlp", ("down_proj",), ("experts.gate_up_proj",)])
def test_a_target_that_only_experts_answer_to_is_an_error_that_says_why(chosen):
    with pytest.raises(tk.ConfigError, match="of the experts are tensors of three dimensions, no linear layers"):
        targets.select(experts("Mixtral"), chosen)


# Ends of blocks ------------------------------------------------------------------------------------------------------

USUAL = ["mlp.down_proj", "self_attn.o_proj"]
ENDS = {
    "Llama": USUAL,
    "Mistral": USUAL,
    "Qwen2": USUAL,
    "Gemma": USUAL,
    "Qwen3": USUAL,
    "Gemma2": USUAL,
    "Phi3": USUAL,
    "Phi": ["mlp.fc2", "self_attn.dense"],
    "GPT2": ["attn.c_proj", "mlp.c_proj"],
    "OPT": ["fc2", "self_attn.out_proj"],
    "Bloom": ["mlp.dense_4h_to_h", "self_attention.dense"],
    "T5ForConditionalGeneration": ["DenseReluDense.wo", "EncDecAttention.o", "SelfAttention.o"],
    "BertForMaskedLM": ["attention.output.dense", "output.dense"],
    "BertForSequenceClassification": ["attention.output.dense", "output.dense"],
}


@pytest.mark.parametrize("family", FAMILIES | ENCODERS)
def test_every_block_has_one_end(family):
    model = build(family)
    ends = targets.ends(model, ("attention", "mlp"))
    # Two layers of two blocks each; a decoder that attends to an encoder has three, beside the encoder's two.
    assert len(ends) == (10 if family.startswith("T5") else 4)
    assert ends == [name for name in targets.linear_layers(model) if name in ends]
    assert all(any(name.endswith(f".{end}") for end in ENDS[family]) for name in ends)
    assert all(any(name.endswith(f".{end}") for name in ends) for end in ENDS[family])
    feedforward = set(targets.select(model, "mlp"))
    assert targets.ends(model, ("mlp",)) == [name for name in ends if name in feedforward]


@pytest.mark.parametrize("family", EXPERTS)
def test_a_block_of_experts_has_no_end(family):
    with pytest.raises(tk.ConfigError, match="cannot tell what ends a block of experts: down_proj, gate_up_proj of"):
        targets.ends(experts(family), ("attention", "mlp"))
    assert len(targets.ends(experts(family), ("attention",))) == 2


def test_both_layers_of_bert_are_told_apart_where_they_have_one_width():
    import torch
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig(**SMALL, intermediate_size=32))
    assert targets.ends(model, ("mlp",)) == ["encoder.layer.0.output.dense", "encoder.layer.1.output.dense"]
