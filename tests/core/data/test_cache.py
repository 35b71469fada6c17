"""Encoded rows are made once, and made again whenever anything they depend on is another."""

import json
import os
import subprocess
import sys

import attrs
import pytest

import tunekit as tk
from tunekit.core.data import cache, dataset
from tunekit.core.data.codec import PLAIN_TEMPLATE, Codec
from tunekit.testing import tiny_tokenizer

ROWS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(20)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@attrs.frozen(kw_only=True)
class Counting(tk.SFT):
    """Counts the rows it encodes."""

    seen: list = attrs.field(factory=list)

    def encode(self, example, codec):
        self.seen.append(example)
        return super().encode(example, codec)


def load(rows=ROWS, codec=None, seed=0, **trainer):
    trainer = Counting(**trainer)
    codec = codec or Codec(tiny_tokenizer())
    return dataset.load(tk.InMemory(rows=rows), 0.2, trainer, codec, None, seed), len(trainer.seen)


def listed(data):
    return [list(data.train), list(data.validation)]


def test_the_second_run_encodes_nothing_and_has_the_same_rows():
    first, encoded = load()
    again, encoded_again = load()
    assert (encoded, encoded_again) == (20, 0)
    assert listed(first) == listed(again)
    assert first.fingerprint == again.fingerprint


def test_the_rows_are_those_that_encoding_each_gives():
    data, _ = load()
    codec = Codec(tiny_tokenizer())
    expected = [codec.encode(row) for row in tk.InMemory(rows=ROWS).load("train")]
    train, held_out = listed(data)
    assert len(train) + len(held_out) == 20
    assert all(row in expected for row in train + held_out)
    assert [row for row in expected if row in train] == train, "in the order of the source"
    assert data.tokens == sum(len(row["input_ids"]) for row in train)
    assert data.supervised_tokens == sum(label != -100 for row in train for label in row["labels"][1:])


def other_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    return tokenizer


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [*ROWS[:-1], {**ROWS[-1], "completion": "another"}]},
        {"rows": ROWS[::-1]},
        {"rows": ROWS[:-1]},
        {"train_on": "all"},
        {"codec": Codec(tiny_tokenizer(), PLAIN_TEMPLATE.replace("###", "##"))},
        {"codec": Codec(other_tokenizer())},
    ],
    ids=["row", "order", "fewer", "mask", "template", "tokenizer"],
)
def test_anything_that_the_rows_depend_on_has_them_encoded_again(change):
    load()
    _, encoded = load(**change)
    assert encoded == len(change.get("rows", ROWS))


def test_a_tokenizer_that_was_used_is_the_same_tokenizer():
    codec = Codec(tiny_tokenizer())
    codec.tokenizer("cut", truncation=True, max_length=2)
    before = cache.tokenizer_identity(codec.tokenizer)
    codec.tokenizer(["pad", "to the same length"], padding=True)
    assert cache.tokenizer_identity(codec.tokenizer) == before
    assert load(codec=codec)[1] == 20
    assert load()[1] == 0


def test_other_code_has_them_encoded_again(monkeypatch):
    load()
    monkeypatch.setattr(cache, "code_identity", lambda file: "other")
    assert load()[1] == 20


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 1.0}, {"max_length": 60, "on_long": "drop"}, {"seed": 1}],
    ids=["rate", "length", "seed"],
)
def test_what_they_do_not_depend_on_is_no_reason(change):
    load()
    assert load(**change)[1] == 0


def test_rows_that_cannot_be_encoded_leave_nothing_behind(own_cache):
    bad = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}
    with pytest.raises(tk.DataError, match="row 1"):
        load(rows=[bad])
    assert list(own_cache.rglob("*.values")) == []
    assert tk.cache_info().entries == ()


@pytest.mark.parametrize("file", ["input_ids.values", "labels.ends", "supervised", "meta.json"])
def test_an_entry_that_lost_its_end_in_a_power_failure_is_made_again(file):
    first, _ = load()
    place = tk.cache_info().entries[0].directory
    content = (place / file).read_bytes()
    (place / file).unlink()
    (place / file).write_bytes(content[: len(content) // 2])
    again, encoded = load()
    assert encoded == 20
    assert len(listed(again)[0]) == len(first.train)


def test_two_processes_that_make_the_same_entry_both_have_it(own_cache):
    program = """
import tunekit as tk
from tunekit.core.data import dataset
from tunekit.core.data.codec import Codec
from tunekit.testing import tiny_tokenizer
rows = [{"text": f"row {number}"} for number in range(3000)]
print(dataset.load(tk.InMemory(rows=rows), 0.2, tk.SFT(), Codec(tiny_tokenizer()), None, 0).fingerprint)
"""
    start = [sys.executable, "-c", program]
    processes = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)]
    found = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(found) == 1
    assert len(tk.cache_info().entries) == 1
    assert [path.name for path in (own_cache / "encoded").iterdir() if path.name.startswith(".")] == []


def test_the_cache_says_what_it_holds_and_can_be_cleared():
    load()
    info = tk.cache_info()
    assert [entry.rows for entry in info.entries] == [20]
    assert info.size == sum(file.stat().st_size for file in info.entries[0].directory.iterdir())
    assert str(info.directory) in str(info)
    info.clear()
    assert tk.cache_info().entries == ()
    assert load()[1] == 20


def test_without_a_cache_nothing_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("TUNEKIT_CACHE", "off")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load()[1] == 20
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_made_is_no_reason_to_stop(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "file"))
    assert load(rows=[{"text": f"never seen {number}"} for number in range(9)])[1] == 9


def test_rows_with_other_columns_are_kept_too(own_cache):
    @attrs.frozen(kw_only=True)
    class Pairs(tk.SFT):
        def encode(self, example, codec):
            row = codec.encode(example)
            return {**row, "weights": [len(row["input_ids"])]}

    data = dataset.load(tk.InMemory(rows=ROWS), 0.2, Pairs(), Codec(tiny_tokenizer()), None, 0)
    assert data.train[0]["weights"] == [len(data.train[0]["input_ids"])]
    meta = json.loads((tk.cache_info().entries[0].directory / "meta.json").read_text())
    assert meta["columns"] == ["input_ids", "labels", "weights"]


def test_a_file_whose_bytes_change_is_encoded_again_and_one_that_is_moved_is_not_lost(tmp_path):
    def encoded_from(path, **fields):
        trainer = Counting()
        dataset.load(tk.JsonLines(path=path, **fields), 0.2, trainer, Codec(tiny_tokenizer()), None, 0)
        return len(trainer.seen)

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [encoded_from(path), encoded_from(path)] == [20, 0]
    assert encoded_from(path, columns={"prompt": "completion", "completion": "prompt"}) == 20
    stamp = path.stat().st_mtime_ns
    path.write_text(path.read_text().replace("answer 7", "answer 8"))
    os.utime(path, ns=(stamp, stamp))
    assert encoded_from(path) == 20


def test_rows_that_are_skipped_are_counted_from_the_cache_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "not JSON\n")
    source = tk.JsonLines(path=path, on_error="skip")
    counts = [dataset.load(source, 0.2, tk.SFT(), Codec(tiny_tokenizer()), None, 0).changed for _ in range(2)]
    assert counts[0] == counts[1]
    assert list(counts[0].values()) == [1]
    with pytest.raises(tk.DataError, match=r"rows.jsonl:21"):
        dataset.load(tk.JsonLines(path=path), 0.2, tk.SFT(), Codec(tiny_tokenizer()), None, 0)
