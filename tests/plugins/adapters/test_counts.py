"""Parameter counts that others published, to the last digit, on models of the real shapes without their weights.

Each case cites who printed the number. Where transformers ties weights today that it did not tie then, only the trained
parameters are compared.
"""

import pytest

import tunekit as tk
from tunekit.core.run.plan import count_parameters

QV, EVERY = ("q_proj", "v_proj"), "all-linear"
LLAMA_2_7B = (
    "Llama",
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
)
GROUPED = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
LLAMA_3_8B = ("Llama", GROUPED | {"vocab_size": 128256})
MISTRAL_1 = ("Mistral", GROUPED | {"vocab_size": 32000})
MISTRAL_3 = ("Mistral", GROUPED | {"vocab_size": 32768})
QWEN_HALF = (
    "Qwen2",
    {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
)
QWEN_3B = (
    "Qwen2",
    {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
)
QWEN_7B = (
    "Qwen2",
    {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
)
PHI = (
    "Phi",
    {
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
    },
)
OPT_350M = (
    "OPT",
    {
        "vocab_size": 50272,
        "hidden_size": 1024,
        "ffn_dim": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
    },
)
GPT_3 = (
    "OPT",
    {
        "hidden_size": 12288,
        "ffn_dim": 49152,
        "num_hidden_layers": 96,
        "num_attention_heads": 96,
        "word_embed_proj_dim": 12288,
    },
)
GPT_2 = ("GPT2", {})
ROBERTA = ("Roberta", {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1})
ROBERTA_LARGE = (
    "Roberta",
    {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
)
DEBERTA_XXL = (
    "DebertaV2",
    {
        "vocab_size": 128100,
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 24,
    },
)
VIT = ("ViT", {"num_labels": 101})
BERT = ("Bert", {"vocab_size": 28996, "num_labels": 2})
MT0_LARGE = (
    "MT5",
    {
        "vocab_size": 250112,
        "d_model": 1024,
        "d_kv": 64,
        "d_ff": 2816,
        "num_layers": 24,
        "num_heads": 16,
        "feed_forward_proj": "gated-gelu",
    },
)
T5_LARGE = ("T5", {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16})
BLOOMZ = ("Bloom", {"vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16})
T0_3B = (
    "T5",
    {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "feed_forward_proj": "gated-gelu"},
)
T0_11B = (
    "T5",
    {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"},
)
TASKS = {
    "Roberta": "SequenceClassification",
    "DebertaV2": "MaskedLM",
    "ViT": "ImageClassification",
    "Bert": "SequenceClassification",
    "MT5": "ConditionalGeneration",
    "T5": "ConditionalGeneration",
}

PUBLISHED = {
    "torchtune docs, lora_finetune.rst; litgpt resource-tables: Llama-2-7B": (
        LLAMA_2_7B,
        tk.LoRA(rank=8, targets=QV),
        4_194_304,
        6_742_609_920,
    ),
    "litgpt resource-tables: phi-1.5": (PHI, tk.LoRA(rank=8, targets=QV), 1_572_864, None),
    "mistral-finetune tutorial log: Mistral-7B-v0.3": (
        MISTRAL_3,
        tk.LoRA(rank=64, targets=EVERY),
        167_772_160,
        7_415_795_712,
    ),
    "LLaMA-Factory training logs: Llama-3-8B": (LLAMA_3_8B, tk.LoRA(rank=8, targets=EVERY), 20_971_520, 8_051_232_768),
    "PEFT README: Qwen2.5-3B": (QWEN_3B, tk.LoRA(rank=16, targets=QV), 3_686_400, 3_089_625_088),
    "PEFT peft_model_config.md: opt-350m": (OPT_350M, tk.LoRA(rank=16, targets=QV), 1_572_864, 332_769_280),
    "PEFT QDoRA notebook: Llama-3-8B": (
        LLAMA_3_8B,
        tk.LoRA(rank=8, targets=EVERY, variant="dora"),
        22_347_776,
        8_052_609_024,
    ),
    "PEFT peft_ia3_seq2seq: mt0-large": (MT0_LARGE, tk.IA3(), 282_624, 973_749_248),
    "PEFT README up to 0.9: mt0-large": (MT0_LARGE, tk.LoRA(rank=8, targets=("q", "v")), 2_359_296, None),
    "T-Few, arXiv 2205.05638: T0-3B": (T0_3B, tk.IA3(), 540_672, None),
    "T-Few, arXiv 2205.05638, 4.2 MB: T0-11B": (T0_11B, tk.IA3(), 1_081_344, None),
    "LoRA, arXiv 2106.09685, 4.7M: GPT-3": (GPT_3, tk.LoRA(rank=1, targets=QV), 4_718_592, None),
    "LoRA, arXiv 2106.09685, 37.7M: GPT-3": (GPT_3, tk.LoRA(rank=8, targets=QV), 37_748_736, None),
    "LoRA, arXiv 2106.09685, 0.3M: RoBERTa-base": (ROBERTA, tk.LoRA(rank=8, targets=("query", "value")), 294_912, None),
    "LoRA, arXiv 2106.09685, 0.8M: RoBERTa-large": (
        ROBERTA_LARGE,
        tk.LoRA(rank=8, targets=("query", "value")),
        786_432,
        None,
    ),
    "LoRA, arXiv 2106.09685, 4.7M: DeBERTa-XXL": (
        DEBERTA_XXL,
        tk.LoRA(rank=16, targets=("query_proj", "value_proj")),
        4_718_592,
        None,
    ),
    **{
        f"LoRA, arXiv 2106.09685, AdapterH, {printed}M: GPT-3": (
            GPT_3,
            tk.Bottleneck(size=size),
            count,
            None,
        )
        for printed, size, count in ((7.1, 1, 7_078_080), (21.2, 4, 21_234_432), (40.1, 8, 40_109_568))
    },
    "LoRA, arXiv 2106.09685, AdapterH, 0.8M: RoBERTa-large": (ROBERTA_LARGE, tk.Bottleneck(size=8), 835_968, None),
    "LoRA, arXiv 2106.09685, AdapterP, 0.8M: RoBERTa-large": (
        ROBERTA_LARGE,
        tk.Bottleneck(size=16, placement="pfeiffer"),
        811_392,
        None,
    ),
    "PEFT lora.md: ViT-base, 101 labels": (
        VIT,
        tk.LoRA(rank=16, targets=QV, trained_modules=("classifier",)),
        667_493,
        86_543_818,
    ),
    "PEFT lora-lm-eval notebook: bert-base-cased": (
        BERT,
        tk.LoRA(rank=8, targets=("query", "key"), trained_modules=("classifier",)),
        296_450,
        108_608_260,
    ),
    # The classifier, 768 * 101 + 101, is trained besides: these two methods do not offer that.
    "PEFT 0.7 to 0.13, lora_based_methods: ViT-base": (VIT, tk.LoHa(rank=16, targets=QV), 1_257_317 - 77_669, None),
    "PEFT lokr.md: ViT-base": (VIT, tk.LoKr(rank=16, targets=QV), 116_069 - 77_669, None),
    "PEFT adalora.md: ViT-base": (VIT, tk.AdaLoRA(initial_rank=12, targets=QV), 520_325 - 77_669, None),
    # 20 before the encoder and 20 before the decoder: as many numbers as 40 before a model without encoder.
    "PEFT notebook: T5-large": (T5_LARGE, tk.PromptTuning(virtual_tokens=40), 40_960, 737_709_056),
    "PEFT prefix_tuning.md: bloomz-560m": (BLOOMZ, tk.PrefixTuning(virtual_tokens=20), 983_040, 560_197_632),
    "PEFT p_tuning.md: bloomz-560m": (
        BLOOMZ,
        tk.Peft(type="P_TUNING", options={"num_virtual_tokens": 20, "encoder_hidden_size": 128}),
        300_288,
        559_514_880,
    ),
    "PEFT prefix tuning notebook: bloomz-560m": (BLOOMZ, tk.PrefixTuning(virtual_tokens=30), 1_474_560, 560_689_152),
}
"""Source: (model, method, trained parameters, all parameters)."""

COMPUTED = {
    "LoRA of rank 16, all linear": (tk.LoRA(rank=16), (39_976_960, 41_943_040, 41_943_040, 8_798_208, 40_370_176)),
    "LoRA of rank 8": (tk.LoRA(rank=8, targets=QV), (4_194_304, 3_407_872, 3_407_872, 540_672, 2_523_136)),
    "DoRA of rank 16, all linear": (
        tk.LoRA(rank=16, variant="dora"),
        (41_336_832, 43_319_296, 43_319_296, 9_102_336, 41_760_768),
    ),
    "IA3": (tk.IA3(), (614_400, 524_288, 524_288, 141_312, 645_120)),
    "LoHa of rank 8": (tk.LoHa(rank=8, targets=QV), (8_388_608, 6_815_744, 6_815_744, 1_081_344, 5_046_272)),
    "LoKr of rank 8": (tk.LoKr(rank=8, targets=QV), (327_680, 253_952, 253_952, 45_696, 163_072)),
    "AdaLoRA of rank 12": (
        tk.AdaLoRA(initial_rank=12, targets=QV),
        (6_292_224, 5_112_576, 5_112_576, 811_584, 3_785_376),
    ),
}
"""As PEFT 0.21.2 prints them with its defaults, for the five models below."""
FIVE = (LLAMA_2_7B, LLAMA_3_8B, MISTRAL_1, QWEN_HALF, QWEN_7B)


def llama(vocab, hidden, feed_forward, layers, heads, key_heads, **more):
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        **more,
    }


TIED = {"tie_word_embeddings": True}
GATED_T5_LARGE = {"d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16, "feed_forward_proj": "gated-gelu"}
TOTALS = {
    "Llama-2-13B": (("Llama", llama(32000, 5120, 13824, 40, 40, 40)), 13_015_864_320),
    "Llama-2-70B": (("Llama", llama(32000, 8192, 28672, 80, 64, 8)), 68_976_648_192),
    "Llama-3.2-1B": (("Llama", llama(128256, 2048, 8192, 16, 32, 8, head_dim=64, **TIED)), 1_235_814_400),
    "Llama-3.2-3B": (("Llama", llama(128256, 3072, 8192, 28, 24, 8, head_dim=128, **TIED)), 3_212_749_824),
    "TinyLlama-1.1B": (("Llama", llama(32000, 2048, 5632, 22, 32, 4)), 1_100_048_384),
    "Qwen2.5-1.5B": (("Qwen2", llama(151936, 1536, 8960, 28, 12, 2, **TIED)), 1_543_714_304),
    "Qwen3-14B": (("Qwen3", llama(151936, 5120, 17408, 40, 40, 8, head_dim=128)), 14_768_307_200),
    "gemma-2-2b": (("Gemma2", llama(256000, 2304, 9216, 26, 8, 4, head_dim=256)), 2_614_341_888),
    "phi-2": (("Phi", llama(51200, 2560, 10240, 32, 32, 32)), 2_779_683_840),
    "GPT-2 M": (("GPT2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}), 354_823_168),
    "GPT-2 L": (("GPT2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}), 774_030_080),
    "GPT-2 XL": (("GPT2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}), 1_557_611_200),
    "opt-6.7b": (
        (
            "OPT",
            {
                "hidden_size": 4096,
                "ffn_dim": 16384,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "word_embed_proj_dim": 4096,
                "vocab_size": 50272,
            },
        ),
        6_658_473_984,
    ),
    "T5-base": (("T5", {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}), 222_903_552),
    "RoBERTa-base, 2 labels": (ROBERTA, 124_647_170),
    "RoBERTa-large, 2 labels": ((ROBERTA[0], {**ROBERTA[1], **ROBERTA_LARGE[1]}), 355_361_794),
    "flan-t5-large": (("T5", {**GATED_T5_LARGE, "vocab_size": 32128}), 750_251_008),
    "Llama-2-7B": (LLAMA_2_7B, 6_738_415_616),
    "Llama-3-8B": (LLAMA_3_8B, 8_030_261_248),
    "Mistral-7B v0.1": (MISTRAL_1, 7_241_732_096),
    "Mistral-7B v0.3": (MISTRAL_3, 7_248_023_552),
    "Qwen2.5-0.5B": (QWEN_HALF, 494_032_768),
    "Qwen2.5-3B": (QWEN_3B, 3_085_938_688),
    "Qwen2.5-7B": (QWEN_7B, 7_615_616_512),
    "phi-1.5": (PHI, 1_418_270_720),
    "GPT-2": (GPT_2, 124_439_808),
    "opt-350m": (OPT_350M, 331_196_416),
    "bloomz-560m": (BLOOMZ, 559_214_592),
    "t5-large": (T5_LARGE, 737_668_096),
    "bert-base-cased": (BERT, 108_311_810),
    "mt0-large": (MT0_LARGE, 973_466_624),
    "T0-3B": (T0_3B, 2_783_959_040),
    "T0-11B": (T0_11B, 11_003_736_064),
}
"""Parameters as the model cards say, all of which full fine-tuning trains."""


@pytest.fixture(autouse=True)
def _as_it_comes(monkeypatch):
    """No initial value is drawn: there is nothing to draw for, and on the meta device that takes half of the time."""
    from torch.nn import init

    for name in ("kaiming_uniform_", "normal_", "uniform_", "xavier_uniform_", "ones_", "zeros_"):
        monkeypatch.setattr(init, name, lambda tensor, *_, **__: tensor)


def empty(family, config):
    """A model of the given shape on the meta device."""
    import torch
    import transformers

    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}For{TASKS.get(family, 'CausalLM')}"
    with torch.device("meta"):
        return getattr(transformers, name)(getattr(transformers, f"{family}Config")(**config))


def counts(model, method):
    """Trained and all parameters."""
    family, config = model
    return count_parameters(method.attach(empty(family, dict(config)), tk.Context(model_id="a/b", total_steps=100)))


@pytest.mark.parametrize("source", PUBLISHED)
def test_a_published_count(source):
    model, method, trained, total = PUBLISHED[source]
    found = counts(model, method)
    assert found[0] == trained
    assert total is None or found[1] == total


@pytest.mark.parametrize("case", COMPUTED)
def test_a_count_that_peft_prints(case):
    method, expected = COMPUTED[case]
    assert tuple(counts(model, method)[0] for model in FIVE) == expected


@pytest.mark.parametrize(
    ("method", "expected"),
    [(tk.LoRA(rank=8, targets=("c_attn",)), (294_912, 124_734_720)), (tk.IA3(), (64_512, 124_504_320))],
)
def test_a_count_on_conv1d_layers(method, expected):
    assert counts(GPT_2, method) == expected


@pytest.mark.parametrize("name", TOTALS)
def test_full_fine_tuning_trains_what_the_model_card_says(name):
    model, total = TOTALS[name]
    assert counts(model, tk.Full()) == (total, total)


TOTAL_WITH_LORA = (6_778_392_576, 8_072_204_288, 7_283_675_136, 502_830_976, 7_655_986_688)


def test_all_parameters_with_lora_are_those_that_peft_prints():
    assert tuple(counts(model, tk.LoRA(rank=16))[1] for model in FIVE) == TOTAL_WITH_LORA


METHODS = (
    tk.PromptTuning(),
    tk.PrefixTuning(),
    tk.IA3(),
    tk.LoHa(),
    tk.LoKr(),
    tk.Full(),
    tk.LastLayers(count=1),
    tk.LoRA(variant="pissa", rank=4),
)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_plan_of_a_run_counts_what_is_trained_on_real_weights(method):
    from transformers import AutoModelForCausalLM

    from tunekit.core.common.assets import resolve

    plan = tk.Pipeline(model=tk.TINY, data=tk.JsonLines(path=tk.ORDERS), adapter=method).plan()
    real = method.attach(AutoModelForCausalLM.from_pretrained(resolve(tk.TINY)), tk.Context(model_id=tk.TINY))
    assert count_parameters(real) == (plan.trainable_parameters, plan.total_parameters)
