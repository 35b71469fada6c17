"""What ships inside the package: small, whole, and as its cards say."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tunekit as tk
from tunekit.core.common.assets import resolve
from tunekit.core.data.codec import IGNORED, Codec
from tunekit.core.model.base import Base

ROOT = Path(__file__).parents[1]


def test_the_embedded_model_is_a_small_llama_that_loads_offline_and_whole():
    model = Base(model=tk.TINY).load(device="cpu", dtype="float32")
    assert model.config.model_type == "llama"
    assert model.num_parameters() == 1_435_040
    assert f"{model.num_parameters():,}" in Path(resolve(tk.TINY), "README.md").read_text(encoding="utf-8")


def test_the_package_stays_small(tmp_path):
    packed = tmp_path / "assets.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in Path(resolve(tk.TINY)).parent.rglob("*"):
            archive.write(path)
    assert packed.stat().st_size < 4 * 2**20


def test_the_embedded_tokenizer_keeps_any_text_and_stops_at_the_end_of_a_turn():
    codec = Codec(Base(model=tk.TINY).tokenizer())
    row = {
        "messages": [{"role": "user", "content": "a\nb  c 12"}, {"role": "assistant", "content": "\u00e9\U0001f600 ok"}]
    }
    encoded = codec.encode(row)
    learned = codec.tokenizer.decode([label for label in encoded["labels"] if label != IGNORED])
    assert learned == "\u00e9\U0001f600 ok<|im_end|>"
    assert codec.tokenizer.decode(encoded["input_ids"]).startswith("<|im_start|>user\na\nb  c 12<|im_end|>")


def test_the_embedded_rows_are_what_their_script_makes(tmp_path):
    script = [sys.executable, ROOT / "scripts/make_orders.py", "--out", tmp_path / "orders.jsonl"]
    subprocess.run(script, check=True)
    embedded = Path(resolve(tk.ORDERS)).read_bytes()
    assert (tmp_path / "orders.jsonl").read_bytes() == embedded
    rows = [json.loads(line) for line in embedded.splitlines()]
    assert len(rows) == len({row["prompt"] for row in rows}) == 400


def test_a_name_that_is_not_embedded_is_refused():
    with pytest.raises(tk.ConfigError, match="'tunekit:order' is no embedded asset; did you mean 'tunekit:orders'"):
        resolve("tunekit:order")
