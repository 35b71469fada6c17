"""Rows are told apart by hashes as they would be by themselves, whatever they hold."""

import re
import string
import sys
import tracemalloc
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunekit.core.inspection.row_hashes import Places, RowHashes, normalised, repeats, shared, take_apart
from tunekit.core.inspection.validation import validate
from tunekit.plugins.sources.in_memory import InMemory

TEXT = st.text(alphabet=string.printable + "äÄßé\u00a0\u201c\u201d\u2026\u2014€中１", max_size=12)


def dialogue(prompt, answer, **more):
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer, **more}]}


def slowly(text):
    """What `normalised` promises, one character at a time."""
    if not text.isascii():
        text = re.sub("[\u00a0\u201c\u201d\u2026\u2014]", " ", unicodedata.normalize("NFKC", text.casefold()))
        # What stands for three full stops is punctuation, too.
    text = text.lower() if text.isascii() else text
    kept = "".join(sign for sign in text if not sign.isascii() or sign.isalnum() or sign in "+-*/=<>^%$")
    return kept or text.strip(), re.findall("[0-9]+", re.sub(r"[^\W\d_]|[^\x00-\x7f]", "", text))


@given(st.lists(TEXT, min_size=1, max_size=4))
def test_normalised_is_what_it_says(texts):
    for text, (kept, numbers) in zip(texts, normalised(texts), strict=True):
        expected, found = slowly(text)
        assert kept.decode() == expected
        assert [number.decode() for number in numbers] == found


def test_texts_that_hold_the_joining_character_are_told_apart():
    assert normalised(["a\0b", "c", "\0"]) == [*normalised(["a b", "c"]), (b"", ())]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello, world!", "hello  WORLD"),
        ("It's \u201cfine\u201d\u2026", "its 'fine'..."),
        ("Grüße", "GRÜSSE"),
        ("a\u00a0b", "a b"),
    ],
)
def test_case_blanks_and_punctuation_make_no_difference(one, other):
    assert normalised([one]) == normalised([other])


@pytest.mark.parametrize(
    ("one", "other"),
    [("2 + 3", "2 - 3"), ("1.5", "15"), ("1 23", "12 3"), ("?", "!"), ("\U0001f600", "\U0001f622"), ("10%", "10")],
)
def test_what_means_something_else_stays_apart(one, other):
    assert normalised([one]) != normalised([other])


ROWS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from("ab "), st.sampled_from("ab ")).map(lambda pair: dialogue(*pair)),
        st.tuples(st.sampled_from("ab"), st.sampled_from([0, 1])).map(
            lambda pair: dialogue("a", pair[0], weight=pair[1])
        ),
        st.sampled_from("ab").map(lambda text: {"text": text}),
        st.sampled_from(["x", "y"]).map(lambda name: dialogue("a", "b") | {"tools": [{"name": name}]}),
    ),
    max_size=12,
)


@given(ROWS)
def test_repeated_rows_are_those_that_are_equal(rows):
    prints = RowHashes()
    prints.add([f"row {number + 1}" for number in range(len(rows))], [take_apart(row) for row in rows])
    expected = [(at, rows.index(row)) for at, row in enumerate(rows) if rows.index(row) < at]
    assert list(repeats(prints.exact)) == expected
    assert [prints.places[at] for at in range(len(rows))] == [f"row {at + 1}" for at in range(len(rows))]


@given(st.lists(st.text(max_size=8) | st.from_regex(r"[a:]{0,2}:[0-9]{1,20}", fullmatch=True), max_size=20))
def test_places_come_back_as_they_were(names):
    places = Places()
    places.add(names)
    assert [places[at] for at in range(len(names))] == names


@given(st.lists(st.integers(0, 5)), st.lists(st.integers(0, 5)))
def test_shared_hashes_are_found_but_for_the_hash_of_nothing(ours, theirs):
    found = shared(enumerate(ours), enumerate(theirs))
    assert found == {at: theirs.index(value) for at, value in enumerate(ours) if value in theirs and value != 0}


def test_calls_of_tools_tell_rows_apart():
    made = [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"id": name}]}]}
        for name in ("a", "b", "a")
    ]
    prints = RowHashes()
    prints.add(["row 1"] * 3, [take_apart(row) for row in made])
    assert list(repeats(prints.exact)) == list(repeats(prints.alike)) == [(2, 0)]


def test_memory_grows_by_bytes_a_row_not_by_the_row():
    class Endless(InMemory):
        name = "endless"

        def read(self, split):
            for number in range(self.count):
                yield f"row {number + 1}", dialogue(f"{number} {'question ' * 400}", "answer " * 400 + str(number))

    def peak(count):
        Endless.count = count
        source = Endless(rows=[])
        tracemalloc.start()
        try:
            validate(source)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(200), peak(2200)
    assert (many - few) / 2000 < 400  # a row has 6,400 bytes
    assert sys.getsizeof("question " * 400) > 3000
