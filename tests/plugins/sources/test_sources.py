"""Text files, the Hub, and rows in memory: what they hold, in order, and errors that say where."""

import pytest

import tunekit as tk


def texts(source, split="train"):
    return [row["text"] for row in source.load(split)]


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_bytes("One.\nTwo lines.\n<|endoftext|>\n\n<|endoftext|>\r\nThree\u2028parts.\n<|endoftext|>\n".encode())
    return path


def test_texts_stand_between_separating_lines(stories):
    source = tk.TextFiles(path=stories, separator="<|endoftext|>")
    assert list(source.examine("train")) == [
        (f"{stories}:1", {"text": "One.\nTwo lines."}),
        (f"{stories}:6", {"text": "Three\u2028parts."}),
    ]
    assert texts(tk.TextFiles(path=stories, pattern=r"<\|end.*")) == texts(source)


def test_without_a_separator_a_file_is_one_text(stories):
    (found,) = texts(tk.TextFiles(path=stories))
    assert found.encode() == stories.read_bytes().strip(b"\n")


def test_an_empty_line_can_separate(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n\n\nc\n")
    assert texts(tk.TextFiles(path=tmp_path / "*.txt", separator="")) == ["a\nb", "c"]


def test_a_text_in_another_encoding_is_one_bad_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\n---\nb\xff\nc\n---\nd\n")
    examined = list(tk.TextFiles(path=path, separator="---").examine("train"))
    assert [place for place, _ in examined] == [f"{path}:1", f"{path}:3", f"{path}:6"]
    assert str(examined[1][1]) == f"{path}:3: byte 0xff is not UTF-8; save the file as UTF-8"
    assert texts(tk.TextFiles(path=path, separator="---", encoding="latin-1"))[1] == "bÿ\nc"


def test_an_empty_text_file_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(tk.DataError, match=r"a\.txt: the file has no text"):
        texts(tk.TextFiles(path=tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"separator": "a", "pattern": "b"}, "not both"),
        ({"separator": "a\n"}, "is one line"),
        ({"pattern": "("}, "is no regular expression"),
    ],
)
def test_a_separator_that_cannot_be_one_is_refused(stories, fields, problem):
    with pytest.raises(tk.ConfigError, match=problem):
        tk.TextFiles(path=stories, **fields).check(tk.Context(model_id="m"))


datasets = pytest.importorskip("datasets")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of data sets, and no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_a_local_directory_is_read_as_a_data_set(tmp_path, cache):
    directory = tmp_path / "set"
    directory.mkdir()
    (directory / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (directory / "test.jsonl").write_text('{"text": "c"}\n')
    source = tk.Hub(id=str(directory), validation="test")
    assert source.splits() == ("train", "validation")
    assert (texts(source), texts(source, "validation")) == (["a", "b"], ["c"])
    assert [place for place, _ in source.examine("train")][1] == f"{directory}[train]: row 2"
    assert texts(tk.Hub(id=str(directory), split="train[1:]")) == ["b"]
    with pytest.raises((tk.ConfigError, tk.DataError), match="dev"):
        texts(tk.Hub(id=str(directory), split="dev"))


def test_what_is_not_in_the_cache_is_said_to_be_so_when_offline(cache):
    source = tk.Hub(id="nobody/no-such-set", subset="main")
    with pytest.raises(
        tk.DataError, match=r"nobody/no-such-set \(main\) is not in the local cache .*HF_HUB_OFFLINE is set"
    ):
        texts(source)


def test_class_labels_become_their_names(tmp_path):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
    rows = datasets.Dataset.from_dict({"text": ["t", "u", "v"], "label": [1, 0, -1]}, features=features)
    source = tk.InMemory(rows=rows)
    assert source.rows == ({"text": "t", "label": "good"}, {"text": "u", "label": "bad"}, {"text": "v", "label": None})
    problems = [str(row) for _, row in source.examine("train") if isinstance(row, tk.DataError)]
    assert problems == ["row 3: null where text is required (label)"]


def test_a_data_frame_is_rows_of_plain_values():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["a", None, "c"], "n": [1, 2, 3], "x": [0.5, float("nan"), 1.0]}, index=[7, 7, 9])
    source = tk.InMemory(rows=frame)
    assert source.rows == ({"text": "a", "n": 1, "x": 0.5}, {"n": 2}, {"text": "c", "n": 3, "x": 1.0})
    assert [type(value) for value in source.rows[0].values()] == [str, int, float]


def test_more_rows_than_a_recipe_should_hold_are_refused_with_a_way_out():
    source = tk.InMemory(rows=[{"text": "a"}] * 100_001)
    with pytest.raises(tk.ConfigError, match=r"100,001 rows.*write them to a file"):
        source.check(tk.Context(model_id="m"))
