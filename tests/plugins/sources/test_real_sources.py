"""Every public data set is read: all its rows, as the count and the oddities in its description say."""

import json
from collections import Counter

import attrs
import pytest

import tunekit as tk
from tunekit.core.data.rows import sound

pytestmark = pytest.mark.real


def count(source, split="train"):
    return sum(1 for _ in source.load(split))


def problems(source):
    return [str(row).partition("/data/")[2] for _, row in source.examine("train") if isinstance(row, tk.DataError)]


@pytest.mark.parametrize(
    ("path", "fields", "rows", "keys"),
    [
        ("gsm8k/train.jsonl", {}, 4000, {"messages"}),
        ("gsm8k/*.jsonl", {}, 4300, {"messages"}),
        ("medquad/medquad_a.jsonl", {"group": "question"}, 919, {"messages", "group"}),
        ("openai_toy_chat/*.jsonl", {"on_error": "skip"}, 4, {"messages"}),
        ("openai_drone_functions/*.jsonl", {}, 103, {"messages", "tools"}),
        ("humaneval/HumanEval.jsonl.gz", {"columns": {"completion": "canonical_solution"}}, 164, {"messages"}),
    ],
)
def test_json_lines(shared, path, fields, rows, keys):
    source = tk.JsonLines(path=shared / "data" / path, **fields)
    found = [row for _, row in source.examine("train") if not isinstance(row, tk.DataError)]
    assert len(found) == rows
    assert all(row.keys() == keys for row in found)


def test_a_conversation_without_a_question_is_refused_with_its_line(shared):
    found = problems(tk.JsonLines(path=shared / "data/openai_toy_chat/toy_chat_fine_tuning.jsonl"))
    assert found == [
        "openai_toy_chat/toy_chat_fine_tuning.jsonl:4: role 'assistant' cannot come after 'system' (messages[1].role)"
    ]


def test_preferences(shared):
    source = tk.JsonLines(path=shared / "data/hh_rlhf_harmless/test_lines_517_1316.jsonl")
    changed = Counter()
    rows = list(sound(attrs.evolve(source, on_error="skip"), "train", "train", changed))
    bad = {
        int(place.rpartition(":")[2]): str(row)
        for place, row in source.examine("train")
        if isinstance(row, tk.DataError)
    }
    assert {1, 410, 588, 739} <= bad.keys()
    assert "empty answer" in bad[1]
    assert len(rows) + changed.total() == 800
    # Told apart by another rule: up to where the two transcripts differ, both have the same turns.
    lines = (shared / "data/hh_rlhf_harmless/test_lines_517_1316.jsonl").read_text(encoding="utf-8").split("\n")
    for place, row in rows[:200]:
        line = json.loads(lines[int(place.rpartition(":")[2]) - 1])
        for side in ("chosen", "rejected"):
            said = "".join(
                f"\n\n{'Human' if message['role'] == 'user' else 'Assistant'}: {message['content']}"
                for message in [*row["prompt"], *row[side]]
            )
            assert said.replace(" ", "") == line[side].replace(" ", "")


def test_tables(shared):
    columns = {"label": "category"}
    assert count(tk.Table(path=shared / "data/banking77/train.csv", columns=columns)) == 10_003
    assert count(tk.Table(path=shared / "data/banking77/test.csv", columns=columns)) == 3_080
    labels = {
        row["messages"][1]["content"]
        for row in tk.Table(path=shared / "data/banking77/*.csv", columns=columns).load("train")
    }
    assert labels == set(json.loads((shared / "data/banking77/categories.json").read_text()))


@pytest.mark.parametrize(
    ("name", "rows", "bad"), [("amazon_cells", 1000, []), ("imdb", 1000, []), ("yelp", 1000, [945])]
)
def test_tables_without_quotes_and_names(shared, name, rows, bad):
    path = shared / f"data/uci_sentiment/{name}_labelled.txt"
    source = tk.Table(
        path=path, format="tsv", quote="", header=("text", "label"), labels=("negative", "positive"), on_error="skip"
    )
    examined = list(source.examine("train"))
    assert sum(not isinstance(row, tk.DataError) for _, row in examined) == rows
    assert [place for place, row in examined if isinstance(row, tk.DataError)] == [f"{path}:{line}" for line in bad]
    lines = path.read_bytes().decode().split("\n")
    first = next(row for _, row in examined)["messages"]
    assert first[0]["content"] + "\t" + {"negative": "0", "positive": "1"}[first[1]["content"]] == lines[0]


@pytest.mark.parametrize(("path", "rows"), [("identity/identity.json", 91), ("fastchat/dummy_conversation.json", 500)])
def test_arrays_of_json_that_are_already_read(shared, path, rows):
    found = tk.InMemory(rows=json.loads((shared / "data" / path).read_text(encoding="utf-8")))
    turns = Counter(len(row["messages"]) for row in found.load("train"))
    assert turns.total() == rows
    assert turns == ({2: 91} if rows == 91 else {2: 167, 4: 166, 6: 167})
    assert count(tk.Hub(id=str((shared / "data" / path).parent))) == rows


def test_nested_rows_fit_no_schema_until_they_are_flattened(shared):
    path = shared / "data/self_instruct/seed_tasks.jsonl"
    with pytest.raises(tk.DataError, match=r"seed_tasks\.jsonl:1: missing \(output\)"):
        count(tk.JsonLines(path=path))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    flat = [{"instruction": row["instruction"], **instance} for row in rows for instance in row["instances"]]
    assert count(tk.InMemory(rows=flat)) == 175


def test_prompts_without_answers_are_refused_by_name(shared):
    with pytest.raises(
        tk.DataError, match=r"question\.jsonl:1: no known schema has the columns 'question_id', 'category', 'turns'"
    ):
        count(tk.JsonLines(path=shared / "data/mt_bench/question.jsonl"))


def test_plain_texts(shared):
    stories = tk.TextFiles(path=shared / "data/tinystories/stories_0001_0600.txt", separator="<|endoftext|>")
    text = (shared / "data/tinystories/stories_0001_0600.txt").read_text(encoding="utf-8")
    assert [row["text"].strip() for row in stories.load("train")] == [
        story.strip() for story in text.split("<|endoftext|>") if story.strip()
    ]
    assert count(tk.TextFiles(path=shared / "data/tinyshakespeare/input.txt")) == 1


def test_questions_that_stand_twice_are_on_one_side(shared):
    source = tk.Split(source=tk.JsonLines(path=shared / "data/medquad/medquad_a.jsonl", group="question"))
    sides = {name: {row["messages"][0]["content"] for row in source.load(name)} for name in source.splits()}
    assert not sides["train"] & (sides["validation"] | sides["test"])
    assert not sides["validation"] & sides["test"]
    plain = tk.Split(source=tk.JsonLines(path=shared / "data/medquad/medquad_a.jsonl"))
    leaked = {name: {row["messages"][0]["content"] for row in plain.load(name)} for name in plain.splits()}
    assert leaked["train"] & leaked["test"]
