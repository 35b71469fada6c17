"""Prompt and prefix tuning against the base with the same tokens written out: training, padding, generation, files."""

import json

import pytest

import tunekit as tk
from tunekit.core.evaluation.predicting import generate
from tunekit.plugins.adapters.virtual_tokens import cache_name
from tunekit.testing import tiny_model, tiny_tokenizer
from tunekit.testing.harness import ROWS, Harness
from tunekit.testing.training import distance, logits

COUNT = 6
CONTEXT = tk.Context(model_id=tk.TINY, model_type="llama", total_steps=20)
METHODS = (tk.PromptTuning(virtual_tokens=COUNT), tk.PrefixTuning(virtual_tokens=COUNT))
SMALL = {"vocab_size": 261, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
GATED = SMALL | {"intermediate_size": 64, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 4}
STACKED = {"vocab_size": 261, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "eos_token_id": 4}
FAMILIES = {
    "Llama": GATED,
    "Mistral": GATED | {"sliding_window": 128},
    "Qwen2": GATED,
    "Gemma2": GATED | {"head_dim": 16},
    "Phi": SMALL | {"intermediate_size": 64, "eos_token_id": 4},
    "OPT": SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 16, "eos_token_id": 4},
    "Bloom": STACKED,
    "GPT2": {"vocab_size": 261, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "eos_token_id": 4},
}

by_name = pytest.mark.parametrize("adapter", METHODS, ids=lambda adapter: adapter.name)


def base_of(family, **more):
    """A tiny model whose logits lie far apart."""
    import torch
    import transformers

    torch.manual_seed(0)
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**FAMILIES[family] | more)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 3
    return model


def attach(adapter, model, moved=True):
    """The method over `model`; its numbers are moved far from where they start."""
    import torch

    torch.manual_seed(5)
    wrapped = adapter.attach(model, CONTEXT).eval()
    weight = wrapped.prompt_encoder["default"].embedding.weight
    if moved:
        weight.data += torch.randn(weight.shape) * weight.std()
    return wrapped, weight


def prompts(*lengths):
    import torch

    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 261, (length,), generator=generator).tolist() for length in lengths]


def written_out(adapter, base, weight, ids):
    """The logits of one row without padding, (tokens, vocabulary), by the base model alone."""
    import torch
    from transformers import DynamicCache

    row = torch.tensor([ids])
    with torch.no_grad():
        if adapter.name == "prompt-tuning":
            embedded = torch.cat([weight[None], base.get_input_embeddings()(row)], 1)
            return base(inputs_embeds=embedded, use_cache=False).logits[0, COUNT:]
        cache = DynamicCache()
        heads = weight.shape[1] // 4
        for layer in range(2):
            keys, values = (weight[:, (2 * layer + side) * heads : (2 * layer + side + 1) * heads] for side in (0, 1))
            size = base.config.hidden_size // base.config.num_attention_heads
            size = getattr(base.config, "head_dim", None) or size
            cache.update(*(part.view(1, COUNT, -1, size).transpose(1, 2) for part in (keys, values)), layer)
        positions = torch.arange(COUNT, COUNT + len(ids))[None]
        known = {} if base.config.model_type == "bloom" else {"position_ids": positions}
        mask = torch.ones(1, COUNT + len(ids), dtype=torch.long)
        return base(row, **{cache_name(base): cache}, attention_mask=mask, **known).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
@by_name
def test_it_starts_as_the_base_after_the_tokens_it_starts_from(adapter, family):
    import torch

    base = base_of(family)
    torch.manual_seed(5)
    before, given = torch.randint(261, (COUNT,)), torch.tensor(prompts(9))
    with torch.no_grad():
        expected = base(torch.cat([before[None], given], 1)).logits[:, COUNT:]
        found = attach(adapter, base, moved=False)[0](given, use_cache=False).logits
    assert distance(found, expected) < 1e-4
    assert distance(found, base(given).logits) > 1e-1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@by_name
def test_padding_on_either_side_changes_nothing(adapter, family, side):
    import torch

    base = base_of(family)
    model, weight = attach(adapter, base)
    rows = prompts(3, 9)
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    places = [slice(9 - len(row), 9) if side == "left" else slice(0, len(row)) for row in rows]
    for at, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[at, place], mask[at, place] = torch.tensor(row), 1
    with torch.no_grad():
        found = model(ids, attention_mask=mask, use_cache=False).logits
    assert found.shape == (2, 9, 261)
    for at, (row, place) in enumerate(zip(rows, places, strict=True)):
        assert distance(found[at, place], written_out(adapter, base, weight, row)) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@by_name
def test_generation_in_a_batch_is_that_of_each_row_written_out(adapter, family):
    base, rows = base_of(family), prompts(3, 11, 7)
    model, weight = attach(adapter, base)
    expected = []
    for row in rows:
        ids = list(row)
        while len(ids) < len(row) + 10:
            token = int(written_out(adapter, base, weight, ids)[-1].argmax())
            if token == 4:
                break
            ids.append(token)
        expected.append(ids[len(row) :])
    assert len({tuple(answer) for answer in expected}) == 3
    assert generate(model, tiny_tokenizer(), rows, 10) == expected
    assert [generate(model, tiny_tokenizer(), [row], 10)[0] for row in rows] == expected


def test_a_short_window_counts_no_padding_after_a_prompt():
    model, _ = attach(METHODS[0], base_of("Mistral", sliding_window=8))
    rows = prompts(3, 11, 7)
    alone = [generate(model, tiny_tokenizer(), [row], 10)[0] for row in rows]
    assert generate(model, tiny_tokenizer(), rows, 10) == alone


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@by_name
def test_beams_start_from_the_same_tokens(adapter, options):
    import torch

    model, _ = attach(adapter, base_of("Llama"))
    row = torch.tensor(prompts(5))
    alone = model.generate(row, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)
    both = model.generate(row.repeat(2, 1), max_new_tokens=6, do_sample=False, pad_token_id=0, **options)
    assert torch.equal(both, alone.repeat(2, 1))
    assert torch.equal(alone[:, :5], row.expand(len(alone), -1))
    found = model.generate(row, max_new_tokens=6, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    assert torch.equal(found.sequences[:, :5], row)
    assert found.sequences.shape[1] == 11


@by_name
def test_the_loss_of_a_model_with_labels_is_that_of_its_logits(adapter):
    import torch

    batch = Harness().batch()
    model, _ = attach(adapter, tiny_model())
    out = model(**batch, use_cache=False)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


# PEFT 0.21 calls the cache by the name of before transformers 5.24.
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@by_name
def test_plain_peft_loads_it_with_the_same_logits(adapter, architecture, tmp_path):
    from peft import PeftModel

    batch = Harness(architecture=architecture).batch()
    model, weight = attach(adapter, tiny_model(architecture))
    live = logits(model, batch)
    adapter.save(model, tmp_path)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    theirs = PeftModel.from_pretrained(tiny_model(architecture), tmp_path).eval()
    found = theirs(**inputs, use_cache=False).logits.detach()[:, -live.shape[1] :] * batch["attention_mask"][..., None]
    assert distance(found, live) < 1e-5
    assert distance(logits(adapter.load(tiny_model(architecture), tmp_path), batch), live) < 1e-5
    saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["num_virtual_tokens"] == len(weight) == COUNT


@pytest.mark.parametrize("text", ["Add the numbers", "a", "a text of far more than six tokens, to be cut to them"])
@by_name
def test_it_starts_from_a_text_cut_or_repeated(adapter, text):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunekit.core.common.assets import resolve

    base = AutoModelForCausalLM.from_pretrained(resolve(tk.TINY)).eval()
    ids = AutoTokenizer.from_pretrained(resolve(tk.TINY))(text, add_special_tokens=False)["input_ids"]
    before, given = torch.tensor([(ids * COUNT)[:COUNT]]), torch.tensor(prompts(5))
    with torch.no_grad():
        expected = base(torch.cat([before, given], 1)).logits[:, COUNT:]
        model = type(adapter)(virtual_tokens=COUNT, init_text=text).attach(base, CONTEXT)
        assert distance(model(given, use_cache=False).logits, expected) < 1e-4


@by_name
def test_a_text_without_known_tokens_is_refused(adapter):
    with pytest.raises(tk.ConfigError, match=r"init_text: '' has no tokens"):
        type(adapter)(init_text="").attach(tiny_model(), CONTEXT)


@by_name
def test_it_cannot_be_merged(adapter):
    with pytest.raises(tk.NotSupported, match="keep the adapter and the base side by side"):
        adapter.merge(attach(adapter, tiny_model())[0], CONTEXT)


@by_name
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_from_elsewhere_is_refused(adapter, name):
    import torch

    base = tiny_model()
    cache = getattr(base(torch.tensor(prompts(3)), use_cache=True), cache_name(base))
    with pytest.raises(tk.NotSupported, match="cannot go on from a cache"):
        attach(adapter, base)[0](torch.tensor(prompts(3)), **{name: cache})


# With gradient checkpointing ------------------------------------------------------------------------------------------


def checkpoint_layers(model):
    """By the name that the installed transformers does not warn of."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)()


def test_prompt_tuning_has_the_same_gradients_with_checkpointing():
    found = []
    for checkpointing in (False, True):
        model, weight = attach(METHODS[0], tiny_model())
        if checkpointing:
            checkpoint_layers(model)
        model.train()(**Harness().batch(), use_cache=False).loss.backward()
        found.append(weight.grad)
    assert found[0].any()
    assert distance(*found) < 1e-7


def test_prefix_tuning_refuses_checkpointing_which_would_drop_the_prefix():
    model, _ = attach(METHODS[1], tiny_model())
    checkpoint_layers(model)
    with pytest.raises(tk.NotSupported, match="gradient checkpointing: turn it off, or use PromptTuning"):
        model.train()(**Harness().batch(), use_cache=False)
    base = tiny_model()
    checkpoint_layers(base)
    with pytest.raises(tk.ConfigError, match="does not work with gradient checkpointing"):
        METHODS[1].attach(base, CONTEXT)


# Through the pipeline -------------------------------------------------------------------------------------------------


@by_name
def test_both_trainers_take_the_same_step(adapter, tmp_path):
    import torch
    from safetensors.torch import load_file

    arguments = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    theirs = tk.Transformers(arguments=arguments | {"max_steps": 1, "per_device_train_batch_size": 7})
    ours = tk.SFT(max_steps=1, learning_rate=1.0, optimizer="sgd", schedule="constant", warmup=0, max_grad_norm=1e9)
    found = []
    for name, trainer in (("ours", ours), ("theirs", theirs)):
        pipeline = tk.Pipeline(
            model=tk.TINY, data=tk.InMemory(rows=ROWS), validation=0.0, adapter=adapter, trainer=trainer, device="cpu"
        )
        run = pipeline.run(tmp_path / name)
        found.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")["prompt_embeddings"])
        again = tk.open_run(tmp_path / name)
        assert run.generate("two teas", max_new_tokens=4) == again.generate("two teas", max_new_tokens=4)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_a_row_as_long_as_the_context_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    from tunekit.core.model.base import Base

    base = tmp_path / "gpt2"
    tiny_model("gpt2", n_positions=64).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    rows = [{"text": "a" * count} for count in (20, 30, 63)]  # the end token comes on top
    data = tk.InMemory(rows=rows)

    def pipeline(virtual_tokens, **trainer):
        return tk.Pipeline(
            model=str(base),
            data=data,
            validation=0.0,
            device="cpu",
            adapter=tk.PromptTuning(virtual_tokens=virtual_tokens),
            trainer=tk.SFT(max_steps=1, **trainer),
        )

    monkeypatch.setattr(Base, "load", lambda *args, **options: pytest.fail("weights are loaded"))
    with pytest.raises(tk.DataError, match=r"1 rows of train are longer than 60 tokens.*virtual_tokens=4"):
        pipeline(4).run(tmp_path / "run")
    with pytest.raises(tk.DataError, match=r"longer than 40 tokens; the longest has 6\d\. Set max_length=6"):
        pipeline(4, max_length=40).plan()
    with pytest.raises(tk.ConfigError, match=r"virtual_tokens=63 leave no room in the model's context of 64"):
        pipeline(63).plan()
    assert pipeline(4, on_long="truncate").plan().longest == 60
    monkeypatch.undo()
    run = pipeline(4, on_long="truncate").run(tmp_path / "run")  # the last position is in use, and none after it
    assert run.result["rows"]["changed"] == {"train: cut to 60 tokens": 1}


# What transformers calls the cache -------------------------------------------------------------------------------------


def test_the_cache_is_called_as_the_model_calls_it():
    import torch

    class Older(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None):
            return input_ids

    class Newer(torch.nn.Module):
        def forward(self, input_ids, cache=None, **options):
            return input_ids

    class Other(torch.nn.Module):
        def forward(self, *arguments, **options):
            return arguments

    assert [cache_name(model()) for model in (Older, Newer, Other)] == ["past_key_values", "cache", "past_key_values"]
