"""An export is a plain model, read again before it is there; other code than ours finds in our files what was trained."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tunekit as tk
from tunekit.core.common.distributions import release
from tunekit.core.run import export as exporting
from tunekit.testing import tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"repeat {n}", "completion": f"{n} {n}"} for n in range(6)]
IDS = torch.arange(5, 60)[None]
METHODS = {
    "lora": tk.LoRA(rank=2),
    "rslora": tk.LoRA(rank=2, variant="rslora"),
    "dora": tk.LoRA(rank=2, variant="dora"),
    "pissa": tk.LoRA(rank=2, variant="pissa"),
    "head": tk.LoRA(rank=2, trained_modules=("lm_head",)),
    "adalora": tk.AdaLoRA(initial_rank=3, target_rank=2, interval=1),
    "ia3": tk.IA3(),
    "loha": tk.LoHa(rank=2),
    "lokr": tk.LoKr(rank=2),
    "last-layers": tk.LastLayers(count=1),
    "full": tk.Full(),
}
ROUNDING = 2**-8
"""Of one number in bfloat16, at most, in parts of it."""
PEFT = [name for name in METHODS if name not in ("last-layers", "full")]


def base(place, tokenizer=None, **config):
    model = tiny_model(**config)
    model.save_pretrained(place)
    (tokenizer or tiny_tokenizer()).save_pretrained(place)
    return place


def make(model, adapter, **changes):
    trainer = tk.SFT(max_steps=4, batch_size=2, learning_rate=0.02)
    parts = {"data": tk.InMemory(rows=ROWS), "validation": 0.25, "evaluators": (tk.Perplexity(),), "trainer": trainer}
    return tk.Pipeline(model=str(model), adapter=adapter, **{**parts, **changes})


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS.to(model.device)).logits.float()


def apart(one, other):
    """How far two results are from each other, in parts of them."""
    return float((one - other).norm() / other.norm())


def distance(one, other):
    return float((one - other).abs().max())


@pytest.fixture(scope="module", params=METHODS)
def finished(request, tiny_directory, tmp_path_factory):
    """A run of each method, and the logits of its model, which are not those of the base."""
    run = make(tiny_directory, METHODS[request.param]).run(tmp_path_factory.mktemp(request.param) / "run")
    live = logits(run._model(tuned=True).model)
    assert distance(live, logits(AutoModelForCausalLM.from_pretrained(tiny_directory))) > 1e-3
    return request.param, run, live


# Read by other code than ours ----------------------------------------------------------------------------------------


# PEFT reads AdaLoRA's ranks by LoRA's rules, says that they do not fit, and applies them all the same.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
def test_peft_and_transformers_read_the_adapter(finished, tiny_directory):
    from peft import PeftModel

    name, run, live = finished
    directory = run.directory / "adapter"
    assert (directory / "adapter_config.json").is_file() == (name in PEFT)
    if name in PEFT:
        plain = AutoModelForCausalLM.from_pretrained(tiny_directory)
        assert distance(logits(PeftModel.from_pretrained(plain, directory)), live) < 1e-5
        plain = AutoModelForCausalLM.from_pretrained(tiny_directory)
        if name == "adalora":
            # transformers makes every matrix of the initial rank, and finds those of the file to be of others.
            with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                plain.load_adapter(directory)
            return
        report = plain.load_adapter(directory)
        if name == "head" and release(transformers.__version__) < (5, 23):
            return  # it left a trained head unread
        if name == "dora":
            # transformers 5.23 looks for the magnitudes under another name than PEFT saves them, for any DoRA file.
            assert all("lora_magnitude_vector" in key for key in report.missing_keys)
            assert report.missing_keys, "transformers reads DoRA now: take this branch and the docs' word on it away"
        else:
            assert distance(logits(plain), live) < 1e-5


def test_transformers_reads_the_export(finished, tmp_path):
    _, run, live = finished
    directory = run.export(tmp_path / "new" / "merged")
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert distance(logits(model), live) < 1e-5
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
    assert json.loads((directory / exporting.REPORT).read_text())["compared"]["largest_difference_of_logits"] < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_sum_is_rounded_once(finished, tmp_path, dtype):
    _, run, _ = finished
    whole = load_file(run.export(tmp_path / "whole") / "model.safetensors")
    half = load_file(run.export(tmp_path / "half", dtype=dtype) / "model.safetensors")
    assert whole.keys() == half.keys()
    assert all(torch.equal(half[name], whole[name].to(getattr(torch, dtype))) for name in whole)


# Over a base in bfloat16 ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
@pytest.mark.parametrize("name", ["lora", "dora", "head", "adalora", "ia3", "loha", "lokr", "full"])
def test_over_bfloat16_an_export_is_the_live_model_in_exact_arithmetic_rounded_once(name, tiny_directory, tmp_path):
    from peft import PeftModel

    run = make(tiny_directory, METHODS[name], dtype="bfloat16").run(tmp_path / "run")
    live = run._model(tuned=True).model
    base = AutoModelForCausalLM.from_pretrained(tiny_directory, dtype="bfloat16").float()
    exact = logits(METHODS[name].load(base, run.directory / "adapter"))
    whole = AutoModelForCausalLM.from_pretrained(run.export(tmp_path / "whole", dtype="float32"))
    half = AutoModelForCausalLM.from_pretrained(run.export(tmp_path / "half"))
    assert (whole.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert distance(logits(whole), exact) < 1e-5
    rounded = half.state_dict()
    assert all(torch.equal(rounded[key], value.bfloat16()) for key, value in whole.state_dict().items())
    # What is exported rounds the sum of base and update, the live model what comes out of each of them.
    for model in (half, live):
        assert apart(logits(model), exact) < 2 * ROUNDING
    opened = logits(tk.open_run(run.directory)._model(tuned=True).model)
    # Without AdaLoRA's ranks that are zero, sums in float32 are of fewer terms.
    assert apart(opened, logits(live)) < ROUNDING if name == "adalora" else torch.equal(opened, logits(live))
    if name in PEFT:
        plain = AutoModelForCausalLM.from_pretrained(tiny_directory, dtype="bfloat16")
        theirs = logits(PeftModel.from_pretrained(plain, run.directory / "adapter"))
        # PEFT reads a module that was trained whole in the dtype of the base.
        assert apart(theirs, exact) < 2 * ROUNDING if name == "head" else torch.equal(theirs, opened)


# What an export holds ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_directory, tmp_path_factory):
    pipeline = make(tiny_directory, tk.LoRA(rank=2), baselines=(tk.Prompted(shots=1),))
    return pipeline.run(tmp_path_factory.mktemp("lora") / "run")


def test_the_card_states_what_it_is_made_of_and_no_path_of_this_machine(run, tmp_path, tiny_directory):
    directory = run.export(tmp_path / "merged")
    card = (directory / "README.md").read_text()
    rows, prompted = run.result["rows"], run.prompted_metrics["prompted-1"]
    for fact in (
        f"# {tiny_directory.name}, fine-tuned",
        "adapter/lora of tunekit",
        "rank=2",
        "`in-memory`",
        f"{rows['train']} trained on, {rows['validation']} held out",
        "| metric | base | prompted-1 | tuned |",
        f"| nll | {run.base_metrics['nll']:.4g} | {prompted['nll']:.4g} | {run.metrics['nll']:.4g} |",
        f"torch {importlib.metadata.version('torch')}",
    ):
        assert fact in card
    for path in directory.iterdir():
        for place in (tiny_directory, run.directory.parent, tmp_path, Path.home() / "x"):
            assert str(place).removesuffix("x").encode() not in path.read_bytes(), f"{path.name} holds {place}"


def test_a_path_in_the_recipe_is_a_name_in_the_card(tiny_directory, tmp_path):
    rows = tmp_path / "secret" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = make(tiny_directory, tk.LoRA(rank=2), data=tk.JsonLines(path=rows)).run(tmp_path / "run")
    shutil.rmtree(rows.parent)  # nothing of the data is needed to export
    card = (run.export(tmp_path / "merged") / "README.md").read_text()
    assert "`json-lines` " in card
    assert "path=rows.jsonl" in card
    assert "secret" not in card


def test_the_model_stops_at_every_stop_token_and_is_asked_by_its_template(run, tmp_path):
    directory = run.export(tmp_path / "merged")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    codec = run._model(tuned=True).codec
    assert set(codec.stop_ids) <= set(model.generation_config.eos_token_id)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "repeat 3"}], add_generation_prompt=True, return_dict=False
    )
    assert asked == codec.prompt("repeat 3")


# What does not survive elsewhere -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("adapter", [tk.LoRA(rank=2), tk.Full()], ids=["lora", "full"])
def test_a_tied_head_stays_tied(tmp_path, architecture, adapter):
    place = base(tmp_path / "base", architecture=architecture, tie_word_embeddings=True)
    run = make(place, adapter).run(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(run.export(tmp_path / "merged"))
    assert model.config.tie_word_embeddings
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert ends[0].data_ptr() == ends[1].data_ptr()
    assert distance(logits(model), logits(run._model(tuned=True).model)) < 1e-5


@pytest.mark.parametrize("trained", [("lm_head",), ("embed_tokens",), ("embed_tokens", "lm_head")])
def test_modules_that_were_trained_whole_are_in_the_adapter_and_in_the_export(tmp_path, trained):
    place = base(tmp_path / "base")
    run = make(place, tk.LoRA(rank=2, trained_modules=trained)).run(tmp_path / "run")
    before, after = load_file(place / "model.safetensors"), load_file(run.export(tmp_path / "m") / "model.safetensors")
    opened = tk.open_run(run.directory)._model(tuned=True).model
    assert torch.equal(logits(opened), logits(run._model(tuned=True).model))
    for name in trained:
        full = next(key for key in before if name in key)
        live = next(value for key, value in opened.state_dict().items() if f"{name}.modules_to_save" in key)
        assert not torch.equal(after[full], before[full])
        assert torch.equal(after[full], live)


@pytest.mark.parametrize("trained", [(), ("embed_tokens", "lm_head")])
def test_a_vocabulary_with_rows_to_spare_keeps_them(tmp_path, trained):
    place = base(tmp_path / "base", vocab_size=320)
    run = make(place, tk.LoRA(rank=2, trained_modules=trained)).run(tmp_path / "run")
    directory = run.export(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert len(AutoTokenizer.from_pretrained(directory)) == 261
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 320
    assert distance(logits(model), logits(run._model(tuned=True).model)) < 1e-5


def test_a_base_in_bfloat16_is_merged_in_float32_and_rounded_once(tmp_path):
    place = base(tmp_path / "base")
    run = make(place, tk.LoRA(rank=2), dtype="bfloat16").run(tmp_path / "run")
    half = load_file(run.export(tmp_path / "half") / "model.safetensors")
    whole = load_file(run.export(tmp_path / "whole", dtype="float32") / "model.safetensors")
    adapter = load_file(run.directory / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
    by_hand = load_file(place / "model.safetensors")[f"{name}.weight"].bfloat16().float() + 2 * b @ a
    assert {value.dtype for value in half.values()} == {torch.bfloat16}
    assert distance(whole[f"{name}.weight"], by_hand) < 1e-6
    assert torch.equal(half[f"{name}.weight"], whole[f"{name}.weight"].bfloat16())


# What goes wrong -----------------------------------------------------------------------------------------------------


def broken(monkeypatch, change):
    """Has `change(directory)` done to what was written, before it is read again."""
    save = exporting._save

    def damaged(model, codec, directory):
        save(model, codec, directory)
        change(directory)

    monkeypatch.setattr(exporting, "_save", damaged)


def other_weight(directory):
    from safetensors.torch import save_file

    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0] += 0.1
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def no_weight(directory):
    from safetensors.torch import save_file

    tensors = load_file(directory / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def changed_json(name, **fields):
    def change(directory):
        path = directory / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_weight, r"the logits of what was written are .* away from those of the merged model"),
        (no_weight, r"transformers does not read what was written: .*lacks 1 weights"),
        (changed_json("config.json", rms_norm_eps=0.1), "the logits of what was written are"),
        (changed_json("generation_config.json", eos_token_id=7), r"the stop tokens that were written differ: .*7"),
        (lambda directory: (directory / "chat_template.jinja").write_text("{{ messages }}"), "tokenizer that was writ"),
    ],
)
def test_an_export_that_is_not_the_model_leaves_nothing_and_says_why(run, tmp_path, monkeypatch, change, reason):
    broken(monkeypatch, change)
    with pytest.raises(tk.ExportError, match=reason):
        run.export(tmp_path / "new" / "merged")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing_and_an_empty_directory_is_taken(run, tmp_path, monkeypatch):
    (tmp_path / "merged").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "model_card", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.export(tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert list((tmp_path / "merged").iterdir()) == []
    run.export(tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    with pytest.raises(tk.RunExists, match="is not empty"):
        run.export(tmp_path / "merged")


def test_a_place_that_cannot_be_written_is_an_error_with_its_path(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(tk.ConfigError, match=r"cannot write into .*file/merged"):
        run.export(tmp_path / "file" / "merged")
    with pytest.raises(tk.NotSupported, match="into_quantized needs a quantizer, and this run has none"):
        run.export(tmp_path / "merged", into_quantized=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Into the quantizer's own storage ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["nf4", "int8"])
def quantized(request, tmp_path_factory):
    """A run over a quantized base, whose rows of 64 numbers bitsandbytes computes with rightly on the CPU, too."""
    pytest.importorskip("bitsandbytes")
    place = tmp_path_factory.mktemp(request.param)
    base(place / "base", hidden_size=64, intermediate_size=128)
    quantizer = {"nf4": tk.NF4(), "int8": tk.Int8()}[request.param]
    trainer = tk.SFT(max_steps=12, batch_size=2, learning_rate=0.02)
    return make(place / "base", tk.LoRA(rank=4), quantizer=quantizer, trainer=trainer).run(place / "run")


def nll(run, model):
    """Of the held-out rows, one at a time by transformers' own loss."""
    codec = run._model(tuned=True).codec
    total, count = 0.0, 0
    for row in run._parts.held_out(codec):
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        tokens = int((labels != -100).sum())
        with torch.no_grad():
            total += model(ids, labels=labels).loss.item() * tokens
        count += tokens
    return total / count


def test_into_quantized_writes_a_quantized_model_and_what_it_cost(quantized, tmp_path):
    directory = quantized.export(tmp_path / "small", into_quantized=True)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.is_quantized
    packed = load_file(directory / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert packed.dtype in (torch.uint8, torch.int8)
    report = json.loads((directory / exporting.REPORT).read_text())
    assert report["quantization"] == quantized._parts.quantizer.scheme
    assert report["nll"]["before"] == pytest.approx(quantized.metrics["nll"], abs=1e-4)
    assert report["nll"]["after"] == pytest.approx(nll(quantized, model.eval()), abs=2e-3)
    assert report["nll"]["after"] != pytest.approx(report["nll"]["before"], abs=1e-6)
    card = (directory / "README.md").read_text()
    assert f"{report['nll']['before']:.4g} before and is {report['nll']['after']:.4g} here" in card
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert not (directory / "plain").exists()


def test_without_the_flag_nothing_is_quantized(quantized, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(quantized.export(tmp_path / "plain"))
    assert not hasattr(model.config, "quantization_config")
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert abs(nll(quantized, model) - quantized.metrics["nll"]) < 1e-3


def test_a_quantizer_whose_models_cannot_be_written_is_refused_with_its_name(quantized, tmp_path, monkeypatch):
    save = exporting._save

    def refuses(model, codec, directory):
        if getattr(model, "is_quantized", False):
            raise ValueError("the model is quantized with BITSANDBYTES and is not serializable")
        save(model, codec, directory)

    monkeypatch.setattr(exporting, "_save", refuses)
    scheme = quantized._parts.quantizer.scheme
    with pytest.raises(tk.NotSupported, match=rf"a model quantized by {scheme} cannot be written \(the model is quan"):
        quantized.export(tmp_path / "small", into_quantized=True)
    assert list(tmp_path.iterdir()) == []
