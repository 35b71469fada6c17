"""Every method on every family of models: a whole life, from a start as the base to a merged model that is the same."""

import copy
import functools
import json

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

import tunekit as tk
from tunekit.core.run.checkpoint import trained_parameters
from tunekit.testing import tiny_tokenizer
from tunekit.testing.harness import quantized
from tunekit.testing.training import distance

CONTEXT = tk.Context(model_id="a/b", total_steps=3)
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 4, "vocab_size": 261}
SMALL = ENDS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SMALL | {"intermediate_size": 64}
GROUPED = WIDE | {"num_key_value_heads": 2}
MODELS = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", GROUPED | {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", GROUPED | {"head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", GROUPED | {"head_dim": 8}),
    "phi": ("PhiForCausalLM", WIDE),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "gpt2": ("GPT2LMHeadModel", ENDS | {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "opt": ("OPTForCausalLM", SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("BloomForCausalLM", SMALL),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "bert": ("BertForMaskedLM", WIDE),
    "bert-decoder": ("BertLMHeadModel", WIDE | {"is_decoder": True}),
}
CAUSAL = [name for name in MODELS if name not in ("t5", "bert")]
METHODS = {
    "lora": tk.LoRA(rank=4),
    "dora": tk.LoRA(rank=4, variant="dora"),
    "pissa": tk.LoRA(rank=4, variant="pissa"),
    "adalora": tk.AdaLoRA(initial_rank=4, target_rank=2, interval=1, warmup=0.67, cooldown=0.0),
    "ia3": tk.IA3(),
    "loha": tk.LoHa(rank=4),
    "lokr": tk.LoKr(rank=4),
    "full": tk.Full(),
    "last-layers": tk.LastLayers(count=1),
    "bottleneck": tk.Bottleneck(size=4),
    "prompt-tuning": tk.PromptTuning(virtual_tokens=3),
    "prefix-tuning": tk.PrefixTuning(virtual_tokens=3),
}
SIDE_BY_SIDE = tk.Bottleneck | tk.PromptTuning | tk.PrefixTuning
REFUSED = {
    ("loha", "gpt2"): r"LoHa\.targets: loha cannot adapt the Conv1D layer transformer\.h\.0.*; LoRA and IA3 can",
    ("lokr", "gpt2"): r"LoKr\.targets: lokr cannot adapt the Conv1D layer transformer\.h\.0.*; LoRA and IA3 can",
    ("ia3", "phi3"): "PEFT lists no layers for the architecture 'phi3'; name .* out of down_proj, .*, qkv_proj",
} | {
    (f"{method}-tuning", name): "For.* is no causal language model to put virtual tokens before; LoRA adapts it"
    for method in ("prompt", "prefix")
    for name in ("t5", "bert")
}
"""What does not go together, and what is said."""
WORKING = [(method, name) for name in MODELS for method in METHODS if (method, name) not in REFUSED]


@functools.cache
def model_of(name):
    """A tiny model with random weights; to be copied."""
    cls, config = MODELS[name]
    cls = getattr(transformers, cls)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(cls.config_class(**config)).eval()


def build(name):
    """A model of one's own, with the same weights each time."""
    return copy.deepcopy(model_of(name))


@functools.cache
def tokens():
    """Two rows of eleven tokens."""
    return torch.randint(5, 261, (2, 11), generator=torch.Generator().manual_seed(0))


def forward(model):
    """The logits; a decoder that attends to an encoder gets tokens too."""
    decoder = {"decoder_input_ids": tokens().flip(1)} if model.config.is_encoder_decoder else {}
    return model(input_ids=tokens(), **decoder).logits


def logits(model):
    with torch.no_grad():
        return forward(model.eval())


def train(method, model):
    """Three steps; returns the names of the parameters that have had a gradient which is not zero."""
    parameters, reached = trained_parameters(model), set()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    model.train()
    for step in (1, 2, 3):
        cross_entropy(forward(model)[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).backward()
        reached |= {
            name for name, parameter in parameters.items() if parameter.grad is not None and parameter.grad.any()
        }
        optimizer.step()
        method.after_step(model, step)
        optimizer.zero_grad()
    return reached


@pytest.mark.parametrize(("method", "name"), WORKING, ids=[f"{method}-{name}" for method, name in WORKING])
def test_a_whole_life(method, name, tmp_path):
    method = METHODS[method]
    base = logits(build(name))
    torch.manual_seed(0)
    model = method.attach(build(name), CONTEXT)
    assert not method.starts_as_base or distance(logits(model), base) <= 1e-5, "it starts as its base"

    assert train(method, model) == trained_parameters(model).keys(), "gradients reach all that is trained"
    live = logits(model)
    assert distance(live, base) > 1e-4, "it learns"

    method.save(model, tmp_path)
    loaded = method.load(build(name), tmp_path)
    assert distance(logits(loaded), live) <= 1e-5
    if isinstance(method, SIDE_BY_SIDE):
        with pytest.raises(tk.NotSupported, match="side by side"):
            method.merge(loaded, CONTEXT)
        return
    merged = method.merge(loaded, CONTEXT)
    assert type(merged) is type(model_of(name))
    assert distance(logits(merged), live) <= 1e-5


@pytest.mark.parametrize(("method", "name"), REFUSED, ids=[f"{method}-{name}" for method, name in REFUSED])
def test_what_cannot_work_is_refused_naming_the_alternative(method, name):
    with pytest.raises(tk.ConfigError, match=REFUSED[method, name]):
        METHODS[method].attach(build(name), CONTEXT)


def test_ia3_works_on_fused_projections_that_are_named():
    method = tk.IA3(targets=("qkv_proj", "down_proj"))
    model = method.attach(build("phi3"), CONTEXT)
    assert distance(logits(model), logits(build("phi3"))) <= 1e-5
    assert train(method, model) == trained_parameters(model).keys()


@pytest.mark.parametrize("quantizer", [tk.NF4(), tk.Int8()], ids=lambda quantizer: quantizer.scheme)
@pytest.mark.parametrize("name", CAUSAL)
def test_lora_and_bottleneck_train_on_quantized_bases(name, quantizer):
    pytest.importorskip("bitsandbytes")
    context = tk.Context(model_id="a/b", device="cpu", dtype="float32", quantization=quantizer.scheme, total_steps=3)
    base = quantized(build(name), quantizer, context)
    packed = [layer for layer in base.modules() if quantizer.is_quantized(layer)]
    before = logits(base)
    torch.manual_seed(0)
    for method in (tk.Bottleneck(size=4), tk.QLoRA(rank=4)):
        model = method.attach(copy.deepcopy(base), context)
        assert distance(logits(model), before) <= 1e-5
        assert train(method, model) == trained_parameters(model).keys()
        assert sum(map(quantizer.is_quantized, model.modules())) == len(packed) > 0


@pytest.mark.parametrize(("name", "task"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bert", None)])
def test_the_file_says_what_the_model_is_for_so_that_peft_loads_it_by_itself(name, task, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, PeftModel

    method = METHODS["lora"]
    monkeypatch.chdir(tmp_path)  # the file holds the directory's name, not its path
    build(name).save_pretrained("base")
    model = method.attach(build(name), tk.Context(model_id="base"))
    train(method, model)
    method.save(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == task
    auto = {"CAUSAL_LM": AutoPeftModelForCausalLM, "SEQ_2_SEQ_LM": AutoPeftModelForSeq2SeqLM}.get(task)
    place = tmp_path / "adapter"
    theirs = auto.from_pretrained(place) if auto else PeftModel.from_pretrained(build(name), place)
    assert distance(logits(theirs), logits(model)) <= 1e-5


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_an_encoder_decoder_generates_with_a_method_attached(method):
    method = METHODS[method]
    model = method.attach(build("t5"), CONTEXT)
    train(method, model)
    model.eval()
    found = model.generate(input_ids=tokens(), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    expected = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(6):
        scores = model(input_ids=tokens(), decoder_input_ids=expected).logits[:, -1].detach()
        scores[:, model.config.eos_token_id] = -torch.inf
        expected = torch.cat([expected, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, expected)


def test_the_last_layers_of_an_encoder_decoder_are_those_of_the_decoder():
    names = trained_parameters(tk.LastLayers(count=1).attach(build("t5"), CONTEXT))
    assert {name.split(".layer.")[0] for name in names} == {"decoder.block.1"}


# Through the pipeline ------------------------------------------------------------------------------------------------


def pipeline(name, directory):
    """A pipeline on a model of this family in `directory`."""
    build(name).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    rows = tk.InMemory(rows=[{"prompt": f"{n}", "completion": f"{n} {n}"} for n in range(4)])
    trainer = tk.SFT(max_steps=3, batch_size=4, learning_rate=1e-2)
    return tk.Pipeline(model=str(directory), data=rows, validation=rows, adapter=METHODS["lora"], trainer=trainer)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_run_plans_trains_and_is_exported(name, tmp_path):
    made = pipeline(name, tmp_path / "base")
    plan = made.plan()
    run = made.run(tmp_path / "run")
    assert run.metrics["nll"] < run.base_metrics["nll"]
    live = run._model(tuned=True).model
    assert plan.trainable_parameters == sum(parameter.numel() for parameter in trained_parameters(live).values())
    exported = type(model_of(name)).from_pretrained(run.export(tmp_path / "merged"))
    assert distance(logits(exported), logits(live)) <= 1e-5


@pytest.mark.parametrize(("name", "what"), [("t5", "an encoder and a decoder"), ("bert", "an encoder")])
def test_what_is_no_causal_model_is_refused_before_its_weights_are_read(name, what, tmp_path):
    made = pipeline(name, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    message = (
        rf"Pipeline\.model: .* is {what} \({name}\), and a pipeline trains causal language models: Llama, .*attach"
    )
    with pytest.raises(tk.ConfigError, match=message):
        made.plan()
    with pytest.raises(tk.ConfigError, match=message):
        made.run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
