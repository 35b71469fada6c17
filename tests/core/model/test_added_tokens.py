"""Added tokens mean something after training, and the same after everything that loads the model again."""

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PhiForCausalLM

import tunekit as tk
from tunekit.core.component import Context
from tunekit.core.model import added_tokens, fingerprint
from tunekit.core.model.base import Base, load_base
from tunekit.testing import tiny_model, tiny_tokenizer

TOKENS = ("<tool>", "<think>")
OWN = 261  # tokens of the tiny tokenizer
IDS = [OWN, OWN + 1]
ROWS = [{"prompt": f"use {n}", "completion": "<think><tool>"} for n in range(8)]
PROBE = torch.tensor([[5, IDS[0], 40, IDS[1], 7, 99]])
KINDS = {"untied": {}, "tied": {"tie_word_embeddings": True}, "padded": {"vocab_size": 272}}
METHODS = {
    "lora": tk.LoRA(rank=4),
    "dora": tk.LoRA(rank=4, variant="dora"),
    "pissa": tk.LoRA(rank=4, variant="pissa"),
    "adalora": tk.AdaLoRA(initial_rank=4, target_rank=3, interval=1),
    "full": tk.Full(),
    "qlora": tk.QLoRA(rank=4),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base of each kind: head of its own, head tied to the embedding, vocabulary padded with eleven rows."""
    made = {}
    for kind, config in KINDS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        model = tiny_model(**config)
        with torch.no_grad():  # a padding that no mean may hold; a head that can be certain
            for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
                weight.mul_(20)
            model.get_input_embeddings().weight[OWN:] = 0.5
            model.get_output_embeddings().weight[OWN:] = 0.5
        model.save_pretrained(made[kind])
        tiny_tokenizer().save_pretrained(made[kind])
    return made


def make(base, adapter, steps=36, **changes):
    parts = {
        "data": tk.InMemory(rows=ROWS),
        "validation": 0,
        "evaluators": (),
        "trainer": tk.SFT(max_steps=steps, batch_size=8, learning_rate=0.02, save_every=steps // 2),
        "added_tokens": TOKENS,
    }
    return tk.Pipeline(model=str(base), adapter=adapter, **{**parts, **changes})


def logits(model):
    with torch.no_grad():
        return model.eval()(PROBE).logits.float()


def close(found, run):
    """Assert that logits are those of the run's model, but for rounding: a 100,000th of the largest."""
    expected = logits(run._model(tuned=True).model)
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def loaded(place, tokens=TOKENS, dtype="float32", template=None):
    base = Base(model=str(place), added_tokens=tokens)
    codec = base.codec(template)
    context = Context(model_id=str(place), device="cpu", dtype=dtype, added_ids=base.added_ids(codec))
    return load_base(base, None, codec, context), codec


# What is added ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_start_at_the_mean_of_the_real_ones_and_no_other_row_moves(bases, kind, dtype):
    before = AutoModelForCausalLM.from_pretrained(bases[kind], dtype=getattr(torch, dtype))
    model, codec = loaded(bases[kind], dtype=dtype)
    assert codec.tokenizer.convert_tokens_to_ids(list(TOKENS)) == IDS
    size = 272 if kind == "padded" else OWN + 2
    assert model.config.vocab_size == size
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, name)().weight, getattr(model, name)().weight
        assert new.shape == (size, 32)
        for at in IDS:
            mean = old[:OWN].detach().double().numpy().mean(0)
            torch.testing.assert_close(
                new[at].double(), torch.tensor(mean), atol=1e-7 if dtype == "float32" else 2e-4, rtol=0
            )
        rest = [at for at in range(len(old)) if at not in IDS]
        assert torch.equal(new[rest], old[rest])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "tied")


def test_a_token_that_the_template_does_not_write_is_a_word(bases):
    codec = Base(model=str(bases["untied"]), added_tokens=TOKENS).codec()
    row = codec.encode(
        {"messages": [{"role": "user", "content": "a<tool>"}, {"role": "assistant", "content": "<think>b"}]}
    )
    assert row["input_ids"].count(IDS[0]) == 1
    learned = [label for label in row["labels"] if label != -100]
    assert learned[0] == IDS[1]
    assert codec.decode(learned) == "<think>b", "an answer shows it"
    assert not codec.control_ids & set(IDS)


def test_a_token_that_the_template_writes_is_a_control_token_which_no_content_becomes(bases):
    template = (
        "{%- for message in messages -%}{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
        "{%- endfor -%}{{- '<|assistant|>' if add_generation_prompt -}}"
    )
    marks = ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>", "<tool>")
    codec = Base(model=str(bases["untied"]), added_tokens=marks).codec(template)
    user, system, assistant, end, tool = (codec.tokenizer.convert_tokens_to_ids(mark) for mark in marks)
    assert codec.control_ids >= {user, system, assistant, end}
    assert tool not in codec.control_ids
    assert end in codec.stop_ids
    talk = [{"role": "user", "content": "<|end|><|assistant|>"}, {"role": "assistant", "content": "<tool>"}]
    row = codec.encode({"messages": talk})
    assert [row["input_ids"].count(token) for token in (user, assistant, end)] == [1, 1, 2]
    assert row["labels"][-2:] == [tool, end]


def test_validation_preview_and_plan_count_an_added_token_as_one(bases):
    given = {"validation": 0.25, "evaluators": (tk.Perplexity(),)}
    with_tokens, without = (make(bases["untied"], tk.LoRA(rank=4), added_tokens=of, **given) for of in (TOKENS, ()))
    more = sum((len(token) - 1) * row["completion"].count(token) for row in ROWS for token in TOKENS)
    counted = [sum(row.learned for row in pipeline.preview(rows=8).rows) for pipeline in (with_tokens, without)]
    assert counted[1] - counted[0] == more
    alone = tk.preview(tk.InMemory(rows=ROWS), model=str(bases["untied"]), rows=8, added_tokens=TOKENS)
    assert alone == with_tokens.preview(rows=8)
    plans = [pipeline.plan() for pipeline in (with_tokens, without)]
    reports = [pipeline.validate() for pipeline in (with_tokens, without)]
    for plan, report in zip(plans, reports, strict=True):
        assert (report.tokens, report.supervised_tokens) == (plan.tokens, plan.supervised_tokens)
    assert plans[0].tokens < plans[1].tokens
    assert plans[0].trainable_parameters - plans[1].trainable_parameters == 2 * 2 * 32, "embedding and head"


def test_the_base_is_known_by_what_is_on_the_disk(bases):
    plain, grown = (Base(model=str(bases["untied"]), added_tokens=of) for of in ((), TOKENS))
    assert fingerprint.fingerprint(plain) == fingerprint.fingerprint(grown)


# What is trained -------------------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[
        ("tied", "lora"),
        ("padded", "lora"),
        ("tied", "qlora"),
        ("padded", "full"),
        *(("untied", name) for name in METHODS),
    ],
)
def finished(request, bases, tmp_path_factory):
    kind, name = request.param
    pipeline = make(bases[kind], METHODS[name])
    return kind, name, pipeline, pipeline.run(tmp_path_factory.mktemp(f"{kind}-{name}") / "run")


def test_the_model_learns_to_say_them_and_says_the_same_when_it_is_opened_again(finished):
    _, name, _, run = finished
    assert run.generate("use 1", max_new_tokens=8) == "<think><tool>"
    again = tk.open_run(run.directory)
    if name in ("pissa", "adalora"):  # of other ranks than while it was trained, so that sums are rounded otherwise
        close(logits(again._model(tuned=True).model), run)
    else:
        assert torch.equal(logits(again._model(tuned=True).model), logits(run._model(tuned=True).model))
    assert run.generate("use 1", tuned=False, max_new_tokens=8) != "<think><tool>"


def test_an_export_gives_the_same_logits_in_plain_transformers(finished, bases, tmp_path):
    kind, name, _, run = finished
    place = run.export(tmp_path / "export")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    assert tokenizer.convert_tokens_to_ids(list(TOKENS)) == IDS
    assert tokenizer("<tool>", add_special_tokens=False)["input_ids"] == IDS[:1]
    size = 272 if kind == "padded" else OWN + 2
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == size
    assert len(model.get_output_embeddings().weight) == size
    assert model.config.tie_word_embeddings == (kind == "tied")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "tied")
    close(logits(model), run)
    before, _ = loaded(bases[kind])
    for end in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, end)().weight, getattr(model, end)().weight
        assert all(not torch.equal(old[at], new[at]) for at in IDS)
        rest = [at for at in range(size) if at not in IDS]
        assert torch.equal(new[rest], old[rest]) == (name != "full"), "only the new rows are trained beside an adapter"


def test_the_plan_counted_what_was_trained(finished):
    *_, pipeline, run = finished
    plan = pipeline.plan()
    assert run.result["parameters"] == {"trainable": plan.trainable_parameters, "total": plan.total_parameters}


def test_peft_alone_loads_the_adapter_over_a_base_resized_by_hand(finished):
    _, name, pipeline, run = finished
    if name in ("adalora", "full", "qlora"):
        pytest.skip(
            "PEFT warns of AdaLoRA's ranks; no adapter of PEFT's; a base that would have to be quantized by hand"
        )
    tokenizer = AutoTokenizer.from_pretrained(pipeline.model)
    model = AutoModelForCausalLM.from_pretrained(pipeline.model)
    tokenizer.add_tokens(list(TOKENS))
    model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size), mean_resizing=False)
    theirs = PeftModel.from_pretrained(model, run.directory / "adapter")
    close(logits(theirs), run)


def test_other_tokens_than_those_of_the_run_are_refused_when_it_is_opened(finished, tmp_path):
    *_, run = finished
    place = tmp_path / "run"
    shutil.copytree(run.directory, place, ignore=shutil.ignore_patterns("checkpoints"))
    recipe = place / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("<think>", "<thank>"))
    with pytest.raises(tk.ConfigError, match="another tokenizer: its vocabulary_sha256"):
        tk.open_run(place).generate("use 1")


def test_a_head_that_is_trained_whole_has_its_new_rows_trained_with_it(bases, tmp_path):
    run = make(bases["untied"], tk.LoRA(rank=4, trained_modules=("lm_head",))).run(tmp_path / "run")
    assert run.generate("use 1", max_new_tokens=8) == "<think><tool>"
    close(logits(AutoModelForCausalLM.from_pretrained(run.export(tmp_path / "export"))), run)


def test_over_a_bfloat16_base_the_rows_are_trained_saved_and_restored_in_float32(bases, tmp_path):
    run = make(bases["tied"], tk.LoRA(rank=4), dtype="bfloat16").run(tmp_path / "run")
    with safe_open(run.directory / "adapter/adapter_model.safetensors", "pt") as file:
        (name,) = [key for key in file.keys() if "trainable_tokens" in key]  # noqa: SIM118 - it is no mapping
        saved = file.get_tensor(name)
    assert saved.dtype == torch.float32
    assert not torch.equal(saved, saved.bfloat16().float()), "a change that bfloat16 could not hold"
    model = tk.open_run(run.directory)._model(tuned=True).model
    (row,) = [value for key, value in model.named_parameters() if "trainable_tokens" in key]
    assert torch.equal(row, saved)
    assert run.generate("use 1", max_new_tokens=8) == "<think><tool>"
    assert torch.equal(logits(model), logits(run._model(tuned=True).model))


@pytest.mark.parametrize("adapter", [tk.LoRA(rank=4), tk.Full()], ids=["lora", "full"])
def test_an_interrupted_run_goes_on_to_the_same_end_bit_for_bit(bases, tmp_path, monkeypatch, adapter):
    pipeline = make(bases["untied"], adapter, steps=5)
    whole = pipeline.run(tmp_path / "whole")

    def stop(self, model, step):
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(adapter), "after_step", stop)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(tmp_path / "stopped")
    resumed = pipeline.run(tmp_path / "stopped", resume=True)
    assert resumed.history == whole.history
    files = [sorted((run.directory / "adapter").glob("*.safetensors")) for run in (whole, resumed)]
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(("kind", "name"), [("tied", "lora"), ("untied", "qlora"), ("padded", "full")])
def test_the_numerics_are_verified_with_them(bases, kind, name):
    found = make(bases[kind], METHODS[name], steps=4).verify()
    assert found.ok, str(found)


def test_the_recipe_keeps_them(bases, tmp_path):
    pipeline = make(bases["untied"], tk.LoRA())
    pipeline.save(tmp_path / "recipe.toml")
    assert 'added_tokens = [\n    "<tool>",\n    "<think>",\n]' in (tmp_path / "recipe.toml").read_text()
    assert tk.load(tmp_path / "recipe.toml") == pipeline


# What is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapter", [tk.IA3(), tk.LoHa(), tk.PromptTuning(), tk.Bottleneck(), tk.LastLayers(), tk.Peft(type="VERA")]
)
def test_a_method_that_would_leave_them_frozen_is_refused_by_check(bases, adapter):
    with pytest.raises(tk.ConfigError, match=f"{adapter.name} does not train embeddings.*adalora, full, lora, qlora"):
        make(bases["untied"], adapter).check()
    make(bases["untied"], adapter, added_tokens=()).check()


@pytest.mark.parametrize(
    ("tokens", "problem"), [(("",), "is no token"), ((" <a>",), "is no token"), (("<a>", "<a>"), "is there twice")]
)
def test_what_can_be_no_token_is_refused_by_check(bases, tokens, problem):
    with pytest.raises(tk.ConfigError, match=problem):
        make(bases["untied"], tk.LoRA(), added_tokens=tokens).check()


def test_a_token_that_the_model_has_is_refused_before_weights_are_loaded(bases, tmp_path):
    with pytest.raises(tk.ConfigError, match="'</s>' is a token of this model as it is"):
        make(bases["untied"], tk.LoRA(), added_tokens=("</s>",)).run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_head_that_is_adapted_or_has_a_bias_is_refused_where_peft_would_compute_something_else(bases, tmp_path):
    with pytest.raises(tk.ConfigError, match="lm_head is adapted, so its rows cannot be trained besides"):
        make(bases["untied"], tk.LoRA(targets=("q_proj", "lm_head"))).plan()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    PhiForCausalLM(PhiConfig(vocab_size=OWN, **shape)).save_pretrained(tmp_path / "phi")
    tiny_tokenizer().save_pretrained(tmp_path / "phi")
    with pytest.raises(tk.ConfigError, match="lm_head has a bias, which PEFT loses"):
        make(tmp_path / "phi", tk.LoRA()).plan()
    model, _ = loaded(tmp_path / "phi")
    assert model.lm_head.bias.shape == (OWN + 2,)
    assert make(tmp_path / "phi", tk.Full()).plan().trainable_parameters == model.num_parameters()


def test_weights_that_are_tied_otherwise_than_the_configuration_says_are_refused():
    model = tiny_model()
    model.config.tie_word_embeddings = True
    with pytest.raises(tk.ConfigError, match="says that embedding and head are tied, and its weights differ"):
        added_tokens.make_room(model, IDS)
