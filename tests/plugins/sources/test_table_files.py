"""Tables are read as they stand: no guessed types, no lost rows, and errors with the line of the file."""

import csv
import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tunekit as tk

pa = pytest.importorskip("pyarrow")


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def texts(source):
    return [row["messages"][0]["content"] for row in source.load("train")]


def test_cells_are_texts_and_no_type_is_guessed(tmp_path):
    path = write(tmp_path / "t.csv", "question,answer\n007,NA\n1e5,null\ntrue,3.10\n")
    rows = [[message["content"] for message in row["messages"]] for row in tk.Table(path=path).load("train")]
    assert rows == [["007", "NA"], ["1e5", "null"], ["true", "3.10"]]


CELLS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r\n"), min_size=1).filter(str.strip)


@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), delimiter=st.sampled_from(",;\t"))
def test_what_the_csv_module_writes_is_read_as_it_was(tmp_path_factory, rows, delimiter):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([("question", "answer"), *rows])
    found = [
        tuple(m["content"] for m in row["messages"]) for row in tk.Table(path=path, delimiter=delimiter).load("train")
    ]
    assert found == rows


def test_a_bad_row_has_the_line_it_begins_on_and_does_not_end_the_reading(tmp_path):
    text = 'question,answer\n"a\nb",1\nc\nd,4,5\n\n"e"f,6\ng,7\n'
    path = write(tmp_path / "t.csv", text.encode() + b"h\xff,8\ni,9\n")
    found = [
        (place.rpartition(":")[2], str(row).partition(": ")[2])
        for place, row in tk.Table(path=path).examine("train")
        if isinstance(row, tk.DataError)
    ]
    assert found == [
        ("4", "1 cells, where there are 2 columns; a cell with a delimiter or a quote in it must be quoted"),
        ("5", "3 cells, where there are 2 columns; a cell with a delimiter or a quote in it must be quoted"),
        ("7", "not CSV: ',' expected after '\"'; if quotes are text here, give quote=''"),
        ("9", "byte 0xff is not UTF-8; save the file as UTF-8"),
    ]
    kept = [
        row["messages"][0]["content"]
        for _, row in tk.Table(path=path).examine("train")
        if not isinstance(row, tk.DataError)
    ]
    assert kept == ["a\nb", "g", "i"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the file has no rows"),
        ("question,answer\n", "the file has no rows"),
        ("question,question\na,b\n", "two columns are named 'question'"),
        ("question,\na,b\n", "column 2 has no name"),
        ('question,answer\n"a,b\n', "not CSV: unexpected end of data"),
        ("question,answer\n".encode("utf-16"), "looks like UTF-16"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, text, problem):
    with pytest.raises(tk.DataError, match=problem):
        list(tk.Table(path=write(tmp_path / "t.csv", text)).load("train"))


def test_other_encodings_marks_gzip_and_long_cells(tmp_path):
    assert texts(
        tk.Table(path=write(tmp_path / "a.csv", "question,answer\né,1\n".encode("latin-1")), encoding="latin-1")
    ) == ["é"]
    assert texts(tk.Table(path=write(tmp_path / "b.csv", "\ufeffquestion,answer\r\na,1\r\n"))) == ["a"]
    assert texts(tk.Table(path=write(tmp_path / "c.csv.gz", gzip.compress(b"question,answer\na,1\n")))) == ["a"]
    long = "x" * 200_000
    assert texts(tk.Table(path=write(tmp_path / "d.tsv", f"question\tanswer\n{long}\t1\n"))) == [long]


def test_lines_end_where_files_say_and_nowhere_else(tmp_path):
    path = write(tmp_path / "t.tsv", "a\x85b\t1\nc\u2028d\t2\n")
    assert texts(tk.Table(path=path, header=("question", "answer"))) == ["a\x85b", "c\u2028d"]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"path": "t.data"}, "the suffix of .* names no format"),
        ({"delimiter": "||"}, "must be one character"),
        ({"encoding": "utf-16"}, "cannot be read line by line"),
        ({"encoding": "latin-99"}, "there is no encoding 'latin-99'"),
    ],
)
def test_what_cannot_be_read_is_refused_beforehand(tmp_path, fields, problem):
    for name in ("t.csv", "t.data"):
        write(tmp_path / name, "text\na\n")
    source = tk.Table(**{**fields, "path": tmp_path / fields.get("path", "t.csv")})
    with pytest.raises(tk.ConfigError, match=problem):
        source.check(tk.Context(model_id="m"))


MESSAGES = [
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}],
    [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "b"},
    ],
]


@pytest.mark.parametrize("kind", ["parquet", "file.arrow", "stream.arrow"])
def test_nulls_that_arrow_fills_in_are_taken_out_again(tmp_path, kind):
    table = pa.Table.from_pylist([{"messages": messages} for messages in MESSAGES] * 700)
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        from pyarrow import parquet

        parquet.write_table(table, path)
    else:
        new = pa.ipc.new_file if kind.startswith("file") else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table)
    examined = list(tk.Table(path=path).examine("train"))
    assert [row["messages"] for _, row in examined] == MESSAGES * 700
    assert examined[1099][0] == f"{path}: row 1100"


def test_numbers_and_nulls_of_typed_tables_are_no_texts(tmp_path):
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": pa.array(["a", None])}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"text": pa.array([1])}), tmp_path / "b.parquet")
    problems = [
        str(row) for _, row in tk.Table(path=tmp_path / "*.parquet").examine("train") if isinstance(row, tk.DataError)
    ]
    assert [problem.rpartition("parquet: ")[2] for problem in problems] == [
        "row 2: null where text is required (text)",
        "row 1: expected text, got number 1 (text)",
    ]


def test_a_broken_parquet_file_is_a_data_error(tmp_path):
    path = write(tmp_path / "t.parquet", b"PAR1 nothing of the kind PAR1")
    with pytest.raises(tk.DataError, match=r"t\.parquet: cannot be read as parquet after row 0"):
        list(tk.Table(path=path).load("train"))
