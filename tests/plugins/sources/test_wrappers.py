"""Sources of sources: what they take, in which proportions, and that nothing they leave out is lost from sight."""

import json
from collections import Counter

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tunekit as tk
from tunekit.core.data import dataset
from tunekit.core.data.rows import sound


def numbered(count, letter="a", **fields):
    return tk.InMemory(rows=[{"text": f"{letter}{number}"} for number in range(count)], **fields)


def texts(source, split="train"):
    return [row["text"] for row in source.load(split)]


def test_rows_are_drawn_by_weight():
    source = tk.Mixture(sources=(numbered(9000, "a"), numbered(9000, "b")), weights=(3.0, 1.0), exhausted="stop")
    counts = Counter(text[0] for text in texts(source))
    share = counts["a"] / counts.total()
    # Binomial: three standard deviations.
    assert abs(share - 0.75) < 3 * (0.75 * 0.25 / counts.total()) ** 0.5
    assert counts["a"] == 9000
    assert texts(source) == texts(source)
    assert texts(source) != texts(attrs.evolve(source, seed=1))


def test_what_becomes_of_a_mixture_when_a_source_ends():
    sources = (numbered(5, "a"), numbered(50, "b"))
    found = {
        policy: texts(tk.Mixture(sources=sources, weights=(1.0, 1.0), exhausted=policy))
        for policy in ("go-on", "stop", "repeat")
    }
    assert sorted(found["go-on"]) == sorted(texts(sources[0]) + texts(sources[1]))
    assert 5 <= len(found["stop"]) < 55
    assert set(found["repeat"]) == set(found["go-on"])
    assert Counter(text[0] for text in found["repeat"])["a"] > 5
    assert Counter(found["repeat"])["b7"] == 1


def test_without_weights_the_sources_come_one_after_the_other_up_to_their_caps():
    source = tk.Mixture(sources=(numbered(4, "a"), numbered(4, "b")), caps=(3, 1))
    assert texts(source) == ["a0", "a1", "a2", "b0"]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"weights": (1.0,)}, "expected 2 numbers above 0"),
        ({"caps": (1, 0)}, "expected 2 numbers above 0"),
        ({"exhausted": "repeat"}, "no meaning without weights"),
        ({"sources": ()}, "at least one source"),
        ({"sources": (tk.JsonLines(path="nowhere.jsonl"),)}, "nowhere.jsonl does not exist"),
    ],
)
def test_a_mixture_that_cannot_be_made_is_refused(fields, problem):
    with pytest.raises(tk.ConfigError, match=problem):
        tk.Mixture(**{"sources": (numbered(1), numbered(1)), **fields}).check(tk.Context(model_id="m"))


def test_a_mixture_of_bad_rows_alone_ends():
    bad = tk.InMemory(rows=[{"text": ""}])
    source = tk.Mixture(sources=(bad, numbered(3)), weights=(1.0, 1.0), exhausted="repeat")
    with pytest.raises(tk.DataError, match="row 1: empty text"):
        texts(source)


ROWS = [{"prompt": "ask " * n, "completion": f"answer {n % 3}"} for n in range(1, 7)]


@pytest.mark.parametrize(
    ("fields", "kept", "reason"),
    [
        ({"min_length": 12, "part": "prompt"}, [3, 4, 5, 6], "shorter than min_length (prompt)"),
        ({"max_length": 20}, [1, 2], "longer than max_length"),
        ({"matches": "[12]$", "part": "answer"}, [1, 2, 4, 5], "without what matches asks for (answer)"),
        ({"lacks": "answer 0"}, [1, 2, 4, 5], "with what lacks forbids"),
        ({"keep": lambda row: "0" in row["messages"][1]["content"]}, [3, 6], "not kept by <lambda>"),
    ],
)
def test_rows_that_are_filtered_out_are_counted_by_condition(fields, kept, reason):
    changed = Counter()
    source = tk.Filtered(source=tk.InMemory(rows=ROWS), **fields)
    found = [row["messages"][0]["content"].count("ask") for _, row in sound(source, "train", "train", changed)]
    assert found == kept == [row["messages"][0]["content"].count("ask") for row in source.load("train")]
    assert changed == {f"train: left out, {reason}": 6 - len(kept)}


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_of_equal_rows_the_first_is_kept(numbers):
    source = tk.Filtered(source=tk.InMemory(rows=[{"text": str(number)} for number in numbers]), unique=True)
    assert texts(source) == [str(number) for number in dict.fromkeys(numbers)]


def test_a_filter_does_not_hide_bad_rows():
    rows = [{"text": "a"}, {"text": ""}, {"text": "bb"}]
    with pytest.raises(tk.DataError, match="row 2: empty text"):
        texts(tk.Filtered(source=tk.InMemory(rows=rows), min_length=2))
    changed = Counter()
    list(sound(tk.Filtered(source=tk.InMemory(rows=rows, on_error="skip"), min_length=2), "train", "train", changed))
    assert changed == {"train: left out, shorter than min_length": 1, "train: skipped, empty text (text)": 1}


def is_short(row):
    return len(row["text"]) < 3


def test_a_recipe_with_a_python_function_says_that_it_lacks_it(tmp_path):
    made = tk.Pipeline(model=tk.TINY, data=tk.Filtered(source=tk.JsonLines(path=tk.ORDERS), keep=is_short))
    made.check()
    made.save(tmp_path / "recipe.toml")
    read_again = tk.load(tmp_path / "recipe.toml")
    assert read_again.data.keep_name == "is_short"
    for attempt in (read_again.check, read_again.rows):
        with pytest.raises(tk.ConfigError, match="the Python function 'is_short', which no recipe can hold"):
            attempt()


def split_of(rows, **fields):
    source = tk.Split(source=tk.InMemory(rows=rows, **fields))
    return {name: list(source.load(name)) for name in source.splits()}


def test_the_shares_are_those_asked_for_and_every_row_is_in_one():
    found = split_of([{"text": f"row {number}"} for number in range(4000)])
    assert {name: round(len(rows) / 4000, 1) for name, rows in found.items()} == {
        "train": 0.8,
        "validation": 0.1,
        "test": 0.1,
    }
    assert sum(map(len, found.values())) == 4000
    assert len({json.dumps(row) for rows in found.values() for row in rows}) == 4000


def test_rows_that_are_added_later_move_no_other():
    rows = [{"text": f"row {number}"} for number in range(600)]
    before, after = split_of(rows[:300]), split_of(rows)
    for name in before:
        assert before[name] == [row for row in after[name] if row in rows[:300]]


def test_the_validation_share_is_the_one_that_the_pipeline_would_hold_out():
    rows = [{"text": f"row {number}"} for number in range(500)]
    assert split_of(rows)["validation"] == dataset.hold_out(rows, 0.1, seed=0)[1]


@given(
    st.lists(st.integers(0, 15), min_size=200, max_size=200), st.lists(st.integers(0, 9), min_size=200, max_size=200)
)
def test_neither_groups_nor_equal_rows_are_ever_on_two_sides(contents, groups):
    rows = [{"text": f"row {content}", "doc": group} for content, group in zip(contents, groups, strict=True)]
    source = tk.Split(source=tk.InMemory(rows=rows, group="doc"), train=0.5, validation=0.25, test=0.25)
    seen = {}
    changed = Counter()
    for name in source.splits():
        for _, row in source.examine(name):
            changed[type(row)] += not str(row).startswith(f"{name}:")
            if not isinstance(row, tk.DataError):
                for key in (row["text"], f"group {row['group']}"):
                    assert seen.setdefault(key, name) == name
    assert changed[dict] + changed[tk.LeftOut] == 200


def test_a_pipeline_takes_the_held_out_rows_from_the_split(tmp_path):
    pipeline = tk.Pipeline(model=tk.TINY, data=tk.Split(source=tk.JsonLines(path=tk.ORDERS)))
    train, held_out = pipeline.rows()
    assert [len(train), len(held_out)] == [len(list(pipeline.data.load(name))) for name in ("train", "validation")]
    pipeline.save(tmp_path / "recipe.toml")
    assert tk.load(tmp_path / "recipe.toml") == pipeline


@pytest.mark.parametrize("shares", [{"train": 0.9}, {"train": 0.0, "validation": 0.9}])
def test_shares_that_make_no_whole_are_refused(shares):
    with pytest.raises(tk.ConfigError, match="must add up to 1"):
        tk.Split(source=numbered(9), **shares).check(tk.Context(model_id="m"))


def test_a_share_that_no_row_falls_into_is_an_error():
    with pytest.raises(tk.DataError, match="too few different rows for this share"):
        texts(tk.Split(source=tk.InMemory(rows=[{"text": "a"}] * 5), train=0.98, validation=0.01, test=0.01), "test")
