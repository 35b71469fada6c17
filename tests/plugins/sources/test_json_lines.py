"""JSON Lines are read strictly, and no slower for it: the quick way must never say more than the strict one."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tunekit as tk
from tunekit.plugins.sources.json_lines import parse_quickly, parse_strictly

KEYS = st.sampled_from(["a", "b", "a:b", 'q"', "q\\", "é", "\u2028", " "])
TEXTS = st.text(st.sampled_from(list('ab:" \\\t{},é\u2028\U0001f600')), max_size=6)
VALUES = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers(-9, 9),
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(KEYS, inner), max_size=3).map(tuple),
    max_leaves=6,
)
OBJECTS = st.lists(st.tuples(KEYS, VALUES), max_size=4).map(tuple)


@st.composite
def spelled(draw, value):
    """A value as JSON text in one of its many spellings; a tuple of pairs is an object, which may have a key twice."""
    blank = st.sampled_from(["", "", "", " ", "\t", "  "])
    if isinstance(value, tuple):
        pairs = [
            draw(spelled(key)) + draw(blank) + ":" + draw(blank) + draw(spelled(item)) + draw(blank)
            for key, item in value
        ]
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(draw(spelled(item)) for item in value) + "]"
    text = json.dumps(value, ensure_ascii=draw(st.booleans()))
    return text.replace(":", "\\u003a") if isinstance(value, str) and draw(st.booleans()) else text


ROWS = OBJECTS.flatmap(spelled)
ENDS = st.sampled_from(["", "", "", " ", "\r", "\xa0", "\x1f", "}", ",{}", " {}", "\x00"])
LINES = st.one_of(
    ROWS,
    ROWS,
    ROWS,
    ROWS.flatmap(lambda row: ENDS.map(row.__add__)),
    st.sampled_from(["", '"a"', "[{}]", '{"a":', "1", '{"a": NaN}', '"a": {}}']),
)


def strictly(line):
    try:
        return parse_strictly(line.decode("utf-8"), "f:1")
    except (tk.DataError, UnicodeDecodeError):
        return None


@given(st.lists(LINES, min_size=1, max_size=5), st.booleans())
def test_the_quick_way_gives_what_the_strict_one_gives_or_nothing(lines, ended):
    encoded = [f"{line}\n".encode() for line in lines]
    if not ended:
        encoded[-1] = encoded[-1].removesuffix(b"\n") or b"{}"
    for line, row in zip(encoded, parse_quickly(encoded), strict=True):
        assert row is None or row == strictly(line)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), TEXTS, min_size=1), min_size=1, max_size=4))
def test_sound_rows_go_the_quick_way(rows):
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    assert parse_quickly(lines) == rows


def test_a_key_that_stands_twice_is_found_among_sound_lines():
    sound = b'{"prompt": "a: b", "completion": "c"}\n'
    twice = b'{"prompt": "a", "completion": "b", "completion": "c: d"}\n'
    assert parse_quickly([sound, twice, sound]) == [json.loads(sound), None, json.loads(sound)]


def test_a_row_over_two_lines_is_two_bad_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text":\n"b"}\n{"text": "c"}\n')
    found = [(place, type(row)) for place, row in tk.JsonLines(path=path).examine("train")]
    assert found == [(f"{path}:1", dict), (f"{path}:2", tk.DataError), (f"{path}:3", tk.DataError), (f"{path}:4", dict)]


def test_many_blocks_keep_their_line_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"{number} " + "x" * 200}) for number in range(1, 2001)]
    lines[1499] = "broken"
    path.write_text("\n".join(lines))
    examined = list(tk.JsonLines(path=path).examine("train"))
    assert [place for place, _ in examined] == [f"{path}:{number}" for number in range(1, 2001)]
    assert [place for place, row in examined if isinstance(row, tk.DataError)] == [f"{path}:1500"]
    assert examined[1999][1]["text"].startswith("2000 ")


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl"])
def test_gzip_is_known_by_its_content(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    assert list(tk.JsonLines(path=path).load("train")) == [{"text": "a"}, {"text": "b"}]


def test_a_damaged_gzip_file_is_a_data_error(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    packed = gzip.compress("".join(json.dumps({"text": str(n) * 50}) + "\n" for n in range(5000)).encode())
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(tk.DataError, match=r"rows\.jsonl\.gz: the gzip file is cut off or damaged"):
        list(tk.JsonLines(path=path).load("train"))


def test_patterns_and_several_paths_are_read_in_a_fixed_order(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    found = [row["text"] for row in tk.JsonLines(path=tmp_path / "*.jsonl").load("train")]
    assert found == ["a", "b", "c"]
    named = tk.JsonLines(path=(tmp_path / "c.jsonl", str(tmp_path / "[ab].jsonl")))
    assert [row["text"] for row in named.load("train")] == ["c", "a", "b"]
    assert next(place for place, _ in named.examine("train")) == f"{tmp_path / 'c.jsonl'}:1"


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    (tmp_path / "rows[1].jsonl").write_text('{"text": "a"}\n')
    assert list(tk.JsonLines(path=tmp_path / "rows[1].jsonl").load("train")) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("rows.json", "does not exist; did you mean 'rows.jsonl'"),
        ("*.csv", "no file matches"),
        (".", "is a directory; write which of its files"),
    ],
)
def test_a_path_that_names_no_file_is_refused_before_anything_is_read(tmp_path, name, problem):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    source = tk.JsonLines(path=tmp_path / name)
    with pytest.raises(tk.ConfigError, match=problem):
        source.check(tk.Context(model_id="m"))
    with pytest.raises(tk.ConfigError, match=problem):
        list(source.load("train"))


def test_a_number_of_too_many_digits_is_a_data_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "n": ' + "9" * 5000 + "}\n")
    with pytest.raises(tk.DataError, match=r"rows\.jsonl:1: a number of too many digits"):
        list(tk.JsonLines(path=path).load("train"))


def test_one_empty_file_among_several_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(tk.DataError, match=r"b\.jsonl: the file has no rows"):
        list(tk.JsonLines(path=tmp_path / "*.jsonl").load("train"))
