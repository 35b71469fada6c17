"""Base models are ranked by the same bytes for all, however their tokenizers cut them; one that fails stops no other."""

import json
import math
import shutil

import pytest
import torch

import tunekit as tk
from tunekit.core.comparison import ranking
from tunekit.core.comparison.ranking import _windows
from tunekit.core.data.codec import IGNORED
from tunekit.testing import tiny_model, tiny_tokenizer

TEXTS = ["one two three four", "a café by the sea: <|im_end|> is no end of turn", "five " * 12]
ROWS = [{"text": text} for text in TEXTS]


@pytest.fixture(scope="module")
def other_directory(tmp_path_factory):
    """The same architecture with other weights."""
    directory = tmp_path_factory.mktemp("other")
    torch.manual_seed(7)
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def ranked(tiny_directory, other_directory):
    return tk.rank_models([other_directory, "./nowhere", tiny_directory], tk.InMemory(rows=ROWS))


def bits_token_by_token(directory, text):
    """Each token predicted by a pass of its own over all that stands before it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    bits = 0.0
    for at, token in enumerate(ids):
        with torch.no_grad():
            logits = model(torch.tensor([[start, *ids[:at]]])).logits[0, -1]
        bits -= float(torch.log_softmax(logits.double(), -1)[token]) / math.log(2)
    return bits


def test_bits_per_byte_are_those_of_every_token_of_every_row_by_all_bytes(ranked, tiny_directory, other_directory):
    size = sum(len(text.encode()) for text in TEXTS)
    assert (ranked.rows, ranked.text_bytes) == (3, size)
    by_name = {found.model: found for found in ranked.models}
    for directory in (tiny_directory, other_directory):
        expected = sum(bits_token_by_token(directory, text) for text in TEXTS) / size
        found = by_name[str(directory)]
        assert found.bits_per_byte == pytest.approx(expected, rel=1e-4)
        assert found.interval[0] <= found.bits_per_byte <= found.interval[1]
        assert found.parameters == tiny_model().num_parameters()
    assert [found.bits_per_byte for found in ranked.models[:2]] == sorted(
        found.bits_per_byte for found in ranked.models[:2]
    )


def test_the_best_comes_first_and_what_failed_last_with_its_reason(ranked, tmp_path):
    assert ranked.best == ranked.models[0].model
    assert ranked.models[0].p is None
    assert 0 < ranked.models[1].p <= 1
    assert ranked.models[2].model == "./nowhere"
    assert "there is no directory './nowhere'" in ranked.models[2].error
    assert str(ranked).splitlines()[-1].startswith("failed: ./nowhere: ConfigError")
    html = ranked._repr_html_()
    assert html.count("<tr>") == 4
    assert "failed: ./nowhere" in html
    saved = json.loads(ranked.save(tmp_path / "ranking.json").read_text(encoding="utf-8"))
    assert [found["model"] for found in saved["models"]] == [found.model for found in ranked.models]
    assert saved["models"][0]["bits_per_byte"] == ranked.models[0].bits_per_byte


def test_at_most_one_model_is_in_memory(tiny_directory, other_directory, monkeypatch):
    import gc
    import weakref

    from tunekit.core.model.base import Base

    loaded, alive = Base.load, []

    def load(self, **options):
        gc.collect()
        assert not [model for model in alive if model() is not None]
        model = loaded(self, **options)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Base, "load", load)
    tk.rank_models([tiny_directory, other_directory], tk.InMemory(rows=ROWS))
    assert len(alive) == 2


def test_turns_and_preferences_are_texts_without_a_template(tiny_directory):
    rows = [{"prompt": "two plus two", "completion": "four"}]
    found = tk.rank_models([tiny_directory], tk.InMemory(rows=rows))
    assert found.text_bytes == len("two plus two\n\nfour")
    chosen = {"prompt": [{"role": "user", "content": "yes?"}], "chosen": [{"role": "assistant", "content": "no"}]}
    assert ranking._text({**chosen, "rejected": []}) == "yes?\n\nno"


@pytest.mark.parametrize("length", [0, 1, 6, 7, 8, 30, 31])
def test_windows_supervise_each_token_once_after_half_a_window_or_all_before_it(length):
    ids = list(range(100, 100 + length))
    supervised = []
    for window in _windows(ids, 1, 8):
        assert len(window["input_ids"]) == len(window["labels"]) <= 8
        assert (window["input_ids"][0], window["labels"][0]) == (1, IGNORED)
        for at, label in enumerate(window["labels"]):
            if label != IGNORED:
                assert label == window["input_ids"][at]
                # The token of beginning, and what stands before it in the text: all, or three tokens at the least.
                assert at - 1 >= min(len(supervised), 3)
                supervised.append(label)
    assert supervised == ids


def test_a_tokenizer_that_does_not_know_the_text_is_no_better_for_it(tiny_directory, tmp_path):
    directory = shutil.copytree(tiny_directory, tmp_path / "blind")
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("sea", add_special_tokens=False)
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(ids[0])
    tokenizer.save_pretrained(directory)
    (found,) = tk.rank_models([directory], tk.InMemory(rows=[{"text": "the sea"}, {"text": "sea"}])).models
    assert "are unknown to it" in found.error
    assert found.bits_per_byte is None


def test_arguments_that_make_no_sense_are_refused(tiny_directory):
    source = tk.InMemory(rows=ROWS)
    for models in ([], [tiny_directory, str(tiny_directory)]):
        with pytest.raises(tk.ConfigError, match="must be different models"):
            tk.rank_models(models, source)
    for wrong in ("rows", "context"):
        with pytest.raises(tk.ConfigError, match=f"rank_models.{wrong}: must be at least"):
            tk.rank_models([tiny_directory], source, **{wrong: 1})
    with pytest.raises(tk.ConfigError, match="nowhere"):
        _ = tk.rank_models(["./nowhere"], source).best
