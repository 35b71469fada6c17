"""Rows are held out by their content, and no row is lost without being counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunekit import SFT, DataError, InMemory
from tunekit.core.data import dataset
from tunekit.core.data.codec import IGNORED, Codec
from tunekit.testing import tiny_tokenizer

TEXTS = st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=30)


def texts(count, start=0):
    return [{"text": f"row {number}"} for number in range(start, start + count)]


def test_about_the_share_is_held_out():
    train, held = dataset.hold_out(texts(2000), 0.1, seed=0)
    assert len(train) + len(held) == 2000
    assert 150 < len(held) < 250


@given(TEXTS, st.floats(0.01, 0.99), st.integers(0, 5))
def test_equal_rows_fall_on_the_same_side_and_both_sides_have_rows(contents, share, seed):
    rows = [{"text": content} for content in contents]
    if len(set(contents)) < 2:
        with pytest.raises(DataError, match="two different rows"):
            dataset.hold_out(rows, share, seed)
        return
    train, held = dataset.hold_out(rows, share, seed)
    assert train
    assert held
    assert not {row["text"] for row in train} & {row["text"] for row in held}


def test_rows_that_are_added_later_move_no_other_row():
    _, before = dataset.hold_out(texts(500), 0.2, seed=0)
    _, after = dataset.hold_out(texts(700), 0.2, seed=0)
    assert before == [row for row in after if row in texts(500)]


def test_the_seed_chooses_what_is_held_out():
    assert dataset.hold_out(texts(100), 0.2, seed=0)[1] != dataset.hold_out(texts(100), 0.2, seed=1)[1]


def load(rows, trainer=None, validation=0.0, longest=None):
    codec = Codec(tiny_tokenizer())
    return dataset.load(InMemory(rows=rows), validation, trainer or SFT(), codec, longest, seed=0)


def test_a_share_of_nothing_holds_nothing_out():
    data = load(texts(3))
    assert (len(data.train), len(data.validation)) == (3, 0)


def test_validation_rows_can_come_from_a_source_of_their_own():
    data = load(texts(3), validation=InMemory(rows=texts(2, start=9)))
    assert (len(data.train), len(data.validation)) == (3, 2)


LONG = [
    {"prompt": "q", "completion": "a" * 80},
    {"prompt": "q" * 200, "completion": "a"},
    {"prompt": "q", "completion": "a"},
]


def test_rows_that_are_too_long_stop_the_run_with_the_smallest_length_that_would_do():
    with pytest.raises(
        DataError, match=r"2 rows of train are longer than 60 tokens; the longest has 222.*max_length=222"
    ):
        load(LONG, SFT(max_length=60))


def test_rows_that_are_dropped_are_counted():
    data = load(LONG, SFT(max_length=60, on_long="drop"))
    assert len(data.train) == 1
    assert data.changed == {"train: dropped, longer than 60 tokens": 2}


def test_rows_that_are_cut_are_counted_and_one_with_nothing_left_to_learn_is_dropped():
    data = load(LONG, SFT(max_length=60, on_long="truncate"))
    assert [len(row["input_ids"]) for row in data.train] == [60, 23]
    assert all(any(label != IGNORED for label in row["labels"]) for row in data.train)
    assert data.changed == {
        "train: cut to 60 tokens": 1,
        "train: dropped, nothing to learn from in the first 60 tokens": 1,
    }


def test_the_models_context_bounds_the_rows_where_the_trainer_does_not():
    with pytest.raises(DataError, match="longer than 100 tokens"):
        load(LONG, longest=100)


def test_no_rows_left_is_an_error():
    with pytest.raises(DataError, match="no row of train is left"):
        load(LONG, SFT(max_length=20, on_long="drop"))


def test_an_error_while_encoding_names_the_row():
    rows = [*texts(1), {"text": "x"}]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    with pytest.raises(DataError, match="row 1: no assistant turn"):
        load([{"messages": messages}])
    assert len(load(rows).train) == 2


SPOILT = [{"text": "a"}, {"text": ""}, {"text": 7}, {"text": "b"}, {"text": " "}, {"text": 8}]


def test_a_bad_row_stops_the_run_with_its_place():
    with pytest.raises(DataError, match=r"row 2: empty text \(text\)"):
        load(SPOILT)


def test_bad_rows_that_are_skipped_are_counted_by_reason():
    codec = Codec(tiny_tokenizer())
    data = dataset.load(InMemory(rows=SPOILT, on_error="skip"), 0.0, SFT(), codec, None, seed=0)
    assert len(data.train) == 2
    assert data.changed == {
        "train: skipped, empty text (text)": 2,
        "train: skipped, expected text, got number N (text)": 2,
    }


def test_a_source_of_bad_rows_alone_says_what_is_wrong_with_them():
    source = InMemory(rows=SPOILT[1:3], on_error="skip")
    with pytest.raises(DataError, match=r"the data has no rows: 1 train: skipped, empty text \(text\)"):
        dataset.load(source, 0.0, SFT(), Codec(tiny_tokenizer()), None, seed=0)


def test_the_table_of_reasons_stays_short():
    rows = [{"text": "a"}, *({"text": None, f"column {letter}": 1} for letter in "abc")]
    rows += [{"messages": [{"role": letter, "content": "x"}]} for letter in "abcdefghijklmnopqrst"]
    changed = dataset.Counter()
    source = InMemory(rows=[*rows[4:], rows[0]], schema="messages", on_error="skip")
    list(dataset.sound(source, "train", "train", changed))
    assert len(changed) == 13
    assert changed["train: skipped, for other reasons"] == 21 - 12


def test_the_rows_of_a_group_are_held_out_together():
    rows = [{"text": f"row {number}", "group": str(number % 40)} for number in range(400)]
    train, held = dataset.hold_out(rows, 0.3, seed=0)
    assert held
    assert not {row["group"] for row in train} & {row["group"] for row in held}


def test_a_preference_is_refused_by_a_trainer_that_learns_one_answer():
    with pytest.raises(DataError, match=r"row 1: a preference.*schema='prompt-completion', columns="):
        load([{"prompt": "q", "chosen": "a", "rejected": "b"}])
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    source = InMemory(rows=rows, schema="prompt-completion", columns={"completion": "chosen"})
    assert next(iter(source.load("train")))["messages"][1]["content"] == "a"


@pytest.mark.parametrize("begin", [False, True], ids=["no-bos", "bos"])
@pytest.mark.parametrize("size", [3, 7, 10, 11, 40])
def test_a_long_text_is_split_into_windows_that_teach_each_token_once_and_are_counted(begin, size):
    codec = Codec(tiny_tokenizer(begin=begin))
    rows = [{"text": "".join(chr(97 + at) for at in range(25))}, {"text": "z"}]
    source = InMemory(rows=rows)
    data = dataset.load(source, 0, SFT(max_length=size, on_long="split"), codec, None, 0)
    whole = codec.encode(rows[0])["input_ids"]
    learned = [label for row in data.train[:-1] for label in row["labels"][1:] if label != IGNORED]
    assert learned == whole[1:], "the first token is predicted by nothing"
    assert all(len(row["input_ids"]) == len(row["labels"]) <= size for row in data.train)
    assert all((row["input_ids"][0] == codec.tokenizer.bos_token_id) == begin for row in data.train)
    assert all(label in (IGNORED, token) for row in data.train for token, label in zip(*row.values(), strict=True))
    assert data.changed == ({} if len(whole) <= size else {f"train: split into windows of {size} tokens": 1})


def test_a_conversation_is_not_split():
    with pytest.raises(DataError, match=r"row \d: a conversation of \d+ tokens, and only plain texts"):
        load(LONG, SFT(max_length=60, on_long="split"))
