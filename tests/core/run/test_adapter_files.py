"""A saved adapter is used as it was saved, on the base and with the template it was trained with, or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tunekit as tk
from tunekit.core.data.codec import Codec
from tunekit.core.model.base import Base
from tunekit.core.model.fingerprint import fingerprint, hash_weights
from tunekit.core.run import adapter_files
from tunekit.core.run import files as run
from tunekit.testing import tiny_model, tiny_tokenizer
from tunekit.testing.tiny import CHATML

ROWS = [{"prompt": f"repeat {n}", "completion": f"{n} {n}"} for n in range(6)]
METHODS = {
    "lora": {"adapter": tk.LoRA(rank=2)},
    "ia3": {"adapter": tk.IA3()},
    "last-layers": {"adapter": tk.LastLayers(count=1)},
    "lora over bfloat16": {"adapter": tk.LoRA(rank=2), "dtype": "bfloat16"},
}


def make(model, adapter, **changes):
    trainer = tk.SFT(max_steps=2, batch_size=2, learning_rate=0.01, save_every=1)
    parts = {"data": tk.InMemory(rows=ROWS), "validation": 0.25, "evaluators": (tk.Perplexity(),)}
    return tk.Pipeline(model=str(model), adapter=adapter, trainer=trainer, **{**parts, **changes})


@pytest.fixture(scope="module", params=METHODS)
def saved(request, tmp_path_factory):
    """A base with a run on it that is finished, side by side."""
    place = tmp_path_factory.mktemp(request.param)
    tiny_model().save_pretrained(place / "base")
    tiny_tokenizer().save_pretrained(place / "base")
    make(place / "base", **METHODS[request.param]).run(place / "run")
    return place


@pytest.fixture
def place(saved, tmp_path):
    """A copy of it to be damaged, whose recipe names the copied base."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    recipe = tmp_path / "run" / run.RECIPE
    recipe.write_text(recipe.read_text().replace(str(saved), str(tmp_path)))
    return tmp_path


def refused(place: Path, reason: str) -> None:
    """Neither asked nor exported, with the reason; and nothing was written."""
    opened = tk.open_run(place / "run")
    with pytest.raises(tk.ConfigError, match=reason):
        opened.generate("repeat 3", max_new_tokens=1)
    with pytest.raises(tk.ConfigError, match=reason):
        opened.export(place / "exported")
    assert sorted(path.name for path in place.iterdir()) == ["base", "run"]


def weights_of(place: Path) -> Path:
    (path,) = (place / "run" / "adapter").glob("*.safetensors")
    return path


def resealed(place: Path) -> None:
    """As if whoever changed the files had known of tunekit.json: only what is in them can tell."""
    directory = place / "run" / "adapter"
    adapter_files.seal(directory, json.loads((directory / adapter_files.PROVENANCE).read_text()))


# As it was saved -----------------------------------------------------------------------------------------------------


def test_a_run_that_was_moved_with_its_base_is_opened_and_exported(place):
    opened = tk.open_run(place / "run")
    assert opened.generate("repeat 3", max_new_tokens=3) == tk.open_run(place / "run").generate(
        "repeat 3", max_new_tokens=3
    )
    opened.export(place / "exported")


def test_no_path_of_this_machine_is_in_the_adapter(saved):
    for path in (saved / "run" / "adapter").rglob("*"):
        assert str(saved).encode() not in path.read_bytes()
        assert str(Path.home()).encode() + b"/" not in path.read_bytes()


def test_one_flipped_bit_in_any_file_is_seen_wherever_it_is(place):
    directory = place / "run" / "adapter"
    for path in sorted(directory.iterdir()):
        whole = path.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 60)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            with pytest.raises(tk.ConfigError, match=r"not as it was saved|cannot read"):
                adapter_files.check_files(directory)
        path.write_bytes(whole)
    adapter_files.check_files(directory)


def test_a_flipped_byte_is_refused_before_any_weights_are_loaded(place, monkeypatch):
    monkeypatch.setattr("tunekit.core.model.base.Base.load", lambda *_, **__: pytest.fail("weights were loaded"))
    path = weights_of(place)
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    refused(place, rf"{path.name}: is not as it was saved: its sha256 is another")


def lacks(tensors):
    return dict(list(tensors.items())[1:])


def renamed(tensors):
    return {(f"{name}x" if at == 0 else name): value for at, (name, value) in enumerate(tensors.items())}


def extra(tensors):
    return {**tensors, "another.weight": torch.zeros(2)}


def reshaped(tensors):
    name = next(iter(tensors))
    return {**tensors, name: torch.cat([tensors[name], tensors[name]])}


@pytest.mark.parametrize(
    ("change", "reason", "reason_resealed"),
    [
        (lacks, "saved: it lacks", r"it lacks \d+ tensors|is not of this model: .* missing there"),
        (renamed, "it lacks .*x besides", r"it lacks \d+ tensors|is not of this model"),
        (extra, "it has another.weight besides", r"it has 1 tensors that fit nowhere: another|is not of this model"),
        (reshaped, r"is \[.*\], not \[", r"size mismatch|is not of this model"),
    ],
)
def test_tensors_that_are_not_those_of_the_model_are_refused_by_name(place, change, reason, reason_resealed):
    path = weights_of(place)
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    refused(place, reason)
    resealed(place)
    refused(place, reason_resealed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(place, value):
    path = weights_of(place)
    tensors = load_file(path)
    name = max(tensors)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    resealed(place)
    refused(place, f"{name} in {path.name} is not finite")


def test_files_that_are_gone_or_were_added_are_refused_by_name(place):
    path = weights_of(place)
    (place / "run" / "adapter" / "notes.txt").write_text("mine")
    adapter_files.check_files(path.parent)
    shutil.copy(path, path.with_name("more.safetensors"))
    refused(place, r"more\.safetensors: was not there when the adapter was saved")
    path.with_name("more.safetensors").unlink()
    path.unlink()
    refused(place, rf"{path.name}: is missing")


def test_an_adapter_of_another_method_is_refused(place):
    path = place / "run" / run.RECIPE
    table = tk.load(path).to_dict()
    tk.Pipeline.from_dict({**table, "adapter": {"use": "loha"}}).save(path)
    refused(place, r"is of adapter/.*, and the pipeline has adapter/loha")


def test_a_training_that_ended_in_nan_is_not_saved(saved, tmp_path):
    method = tk.LastLayers(count=1)
    model = method.attach(tiny_model(), tk.Context(model_id="tiny"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    known = fingerprint(Base(model=str(saved / "base")))
    with pytest.raises(tk.TrainingError, match=r"up_proj\.weight in trained\.safetensors is not finite"):
        adapter_files.save(tmp_path / "adapter", method, model, known, Codec(tiny_tokenizer()))
    assert not (tmp_path / "adapter" / adapter_files.PROVENANCE).exists()


# On the base it was trained on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": 1}, "another base than 'base': the configuration is the same, the weights are not"),
        ({"num_hidden_layers": 1}, "another base than 'base': num_hidden_layers is 1, not 2"),
        ({"num_hidden_layers": 3}, "another base than 'base': num_hidden_layers is 3, not 2"),
        ({"rms_norm_eps": 1e-5}, "another base than 'base': rms_norm_eps is 1e-05, not 1e-06"),
    ],
)
def test_another_base_is_refused(place, changes, reason):
    tiny_model(**changes).save_pretrained(place / "base")
    refused(place, reason)


def test_one_changed_number_of_the_base_is_another_base(place):
    path = place / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    refused(place, "the configuration is the same, the weights are not")


def test_another_revision_with_the_same_weights_is_the_same_base_and_without_their_hash_it_is_refused(place):
    path = place / "run" / run.RECIPE
    path.write_text(path.read_text().replace("\nmodel = ", '\nrevision = "v2"\nmodel = ', 1))
    opened = tk.open_run(place / "run")
    assert opened.generate("one", max_new_tokens=2) is not None
    (place / "base" / "model.safetensors").rename(place / "base" / "elsewhere.safetensors")
    refused(place, "is of another revision of its base: 'v2' here, 'main' there")


def test_a_base_that_changed_cannot_be_gone_on_with(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    pipeline = make(tmp_path / "base", tk.LoRA(rank=2))

    class Stop:
        @tk.hookimpl
        def tunekit_saved(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(tmp_path / "run", observers=[Stop()])
    tiny_model(seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(tk.ConfigError, match="the weights are not"):
        pipeline.run(tmp_path / "run", resume=True)


def test_the_hash_is_of_the_weights_not_of_their_files(tmp_path):
    tiny_model().save_pretrained(tmp_path / "whole")
    tiny_model().save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    hashes = [hash_weights(Base(model=str(tmp_path / name)).weight_files()) for name in ("whole", "parts")]
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert hashes[0] == hashes[1]


def test_of_a_large_tensor_both_ends_and_a_change_throughout_are_seen_and_a_single_number_may_not_be(tmp_path):
    torch.manual_seed(0)
    tensor = torch.randn(1000, 1000)

    def hashed(change):
        changed = tensor.clone()
        change(changed)
        save_file({"weight": changed}, tmp_path / "a.safetensors")
        return hash_weights([tmp_path / "a.safetensors"])

    same = hashed(lambda _: None)
    assert same == hashed(lambda _: None)
    assert same != hashed(lambda changed: changed.mul_(1.001))
    assert same != hashed(lambda changed: changed[0, 0].add_(1))
    assert same != hashed(lambda changed: changed[-1, -1].add_(1))
    assert same == hashed(lambda changed: changed[10, 0].add_(1)), "say so in the docstring when this is seen too"


# With the template it was trained with -------------------------------------------------------------------------------


def test_another_template_is_refused_with_both(place):
    tiny_tokenizer(template=CHATML.replace("<|im_end|>\\n", "<|im_end|>")).save_pretrained(place / "base")
    refused(place, "the template reads otherwise than where the model was trained, .* sha256 .* there, .* here")


def test_another_tokenizer_is_refused_with_the_tokens_of_both(place):
    path = place / "base" / "tokenizer.json"
    table = json.loads(path.read_text())
    vocabulary = table["model"]["vocab"]
    vocabulary["W"], vocabulary["w"] = vocabulary["w"], vocabulary["W"]
    path.write_text(json.dumps(table))
    refused(place, r"the prompt is tokenized otherwise .* from token \d+ on, \[\d+, .*\] there, \[\d+, .*\] here")


def test_a_change_of_tokens_that_the_golden_conversation_has_not_is_refused_too(place):
    path = place / "base" / "tokenizer.json"
    table = json.loads(path.read_text())
    vocabulary = table["model"]["vocab"]
    vocabulary["Q"], vocabulary["Z"] = vocabulary["Z"], vocabulary["Q"]
    path.write_text(json.dumps(table))
    refused(place, "was trained with another tokenizer: its vocabulary_sha256 is")


def test_a_template_that_writes_the_date_is_the_same_tomorrow():
    codec = Codec(tiny_tokenizer(), "{{ strftime_now('%d %B %Y') }}" + CHATML)
    assert adapter_files._contract(codec)["prompt"].startswith("1 January 2024<|im_start|>user\nWhat is 2 + 3?")
