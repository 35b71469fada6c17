"""Real models and real, and really broken, data."""

import json
import math
import os
from pathlib import Path

import pytest

import tunekit as tk

pytestmark = pytest.mark.real

SHARED = Path(os.environ.get("TUNEKIT_SHARED") or Path(__file__).parents[3] / "shared")
EXPECTED = SHARED / "data/malformed/expected.json"
BROKEN = json.loads(EXPECTED.read_text(encoding="utf-8"))["files"] if EXPECTED.exists() else []


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case["file"])
def test_a_broken_file_is_read_or_refused_as_it_deserves(case):
    path = EXPECTED.parent / case["file"]
    source = tk.JsonLines(path=path)
    if case["strict"] == "ok":
        assert len(list(source.load("train"))) == len(case["kept_lines"])
        return
    with pytest.raises(tk.DataError) as caught:
        list(source.load("train"))
    message = str(caught.value)
    defect = next(defect for defect in case["defects"] if defect["severity"] == "error")
    assert message.startswith(str(path))
    if defect["line"] is not None:
        assert f"{path}:{defect['line']}:" in message
    if defect["field"] is not None and defect["class"] != "invalid_json":
        assert f"({defect['field']})" in message


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case["file"])
def test_the_sound_rows_of_a_broken_file_are_kept_as_they_were(case):
    path = EXPECTED.parent / case["file"]
    examined = list(tk.JsonLines(path=path, on_error="skip").examine("train"))
    kept = [(place, row) for place, row in examined if not isinstance(row, tk.DataError)]
    assert [place for place, _ in kept] == [f"{path}:{line}" for line in case["kept_lines"]]
    schema = {"prompt/completion": "prompt-completion"}.get(case["schema"], case["schema"])
    assert [tk.from_example(row, schema) for _, row in kept] == case["kept_rows"]
    assert all(str(row).startswith(place) for place, row in examined if isinstance(row, tk.DataError))


def test_the_likelihood_of_stories_is_the_published_one(shared):
    from tunekit.core.data.codec import Codec
    from tunekit.core.model.base import Base

    base = Base(model=str(shared / "models/stories260k"))
    codec = Codec(base.tokenizer())
    text = (shared / "data/tinystories/stories_0001_0600.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>")][:300]
    # The published figure is of the texts alone, with BOS and cut at 512 tokens; our end token is left off.
    rows = [row["input_ids"][:-1][:512] for row in (codec.encode({"text": story}) for story in stories if story)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    model = base.load(device="cpu", dtype="float32")
    found = tk.Perplexity().evaluate(model, codec.tokenizer, data, tk.Context(model_id="stories260k"))
    assert sum(len(row) - 1 for row in rows) == pytest.approx(110_085, abs=310)
    assert found["nll"] == pytest.approx(1.311, abs=5e-3)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
