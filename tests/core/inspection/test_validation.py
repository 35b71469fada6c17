"""Validation finds what is planted, counts what is there, and agrees with a run about what a run would take."""

import json
import string
from collections import Counter

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tunekit as tk
from tunekit.core.data import dataset
from tunekit.core.data.codec import IGNORED, Codec
from tunekit.core.model.base import Base, context_length


@pytest.fixture(scope="session")
def model(tiny_directory):
    return str(tiny_directory)


def chat(*said, **more):
    """A row of messages: user, assistant, user, ..."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(said)], **more}


def of(*messages, **more):
    return {"messages": [{"role": role, **rest} for role, rest in messages], **more}


def asks(content="Which weather?"):
    return ("user", {"content": content})


def calls(*made, **more):
    return ("assistant", {"tool_calls": list(made), **more})


def call(name="weather", arguments="{}", **more):
    return {"id": "call12345", "type": "function", "function": {"name": name, "arguments": arguments}, **more}


def tool(content="sunny", **more):
    return ("tool", {"content": content, **more})


def says(content="Sunny."):
    return ("assistant", {"content": content})


TOOL = {"type": "function", "function": {"name": "weather", "description": "It is", "parameters": {"type": "object"}}}
SOUND = [chat(f"question {name}", f"answer {name}") for name in string.ascii_lowercase]


def without(name):
    return {"type": "function", "function": {key: value for key, value in TOOL["function"].items() if key != name}}


PLANTED = {
    # OpenAI's data preparation notebook: errors
    "data_type": (["no object"], "error", "expected an object, got list"),
    "missing_messages_list": ({"conversation": []}, "error", "missing (messages)"),
    "message_missing_key, role": (
        {"messages": [{"content": "x"}, {"role": "assistant", "content": "y"}]},
        "error",
        "unknown role None",
    ),
    "message_missing_key, content": (of(("user", {}), says()), "error", "missing (messages[0].content)"),
    "missing_content": (of(("user", {"content": None}), says()), "error", "null where text is required"),
    "content of another type": (of(("user", {"content": 7}), says()), "error", "expected text, got number 7"),
    "unrecognized_role": (of(("human", {"content": "x"}), says()), "error", "unknown role 'human'"),
    "example_missing_assistant_message": (chat("x"), "error", "must end with the assistant"),
    "no user message": (of(("system", {"content": "x"}), says()), "error", "cannot come after 'system'"),
    # and its warnings
    "message_unrecognized_key": (
        of(("user", {"content": "x", "mood": "glad"}), says()),
        "warning",
        "unknown key 'mood'; only a chat template that knows it uses it (messages[0])",
    ),
    "no system message": (
        of(("system", {"content": "x"}), asks(), says()),
        "warning",
        "no system message in 26 of 27 rows",
    ),
    # mistral-finetune's validator: errors
    "no conversation": ({"messages": []}, "error", "empty conversation (messages)"),
    "last role": (chat("x", "y", "z"), "error", "must end with the assistant"),
    "role order": (of(asks(), asks(), says()), "error", "role 'user' cannot come after 'user'"),
    "assistant first": (of(says()), "error", "role 'assistant' cannot come first"),
    "one system message only": (
        of(("system", {"content": "x"}), ("system", {"content": "y"}), asks(), says()),
        "error",
        "role 'system' cannot come after 'system'",
    ),
    "weight": (of(asks(), ("assistant", {"content": "x", "weight": 0.5})), "error", "weight must be 0"),
    "empty answer": (chat("x", " "), "error", "empty answer, nothing to learn from (messages[1].content)"),
    "tool calls are a list": (
        of(asks(), ("assistant", {"tool_calls": "weather"})),
        "error",
        "expected a list of calls",
    ),
    "a call has a function": (of(asks(), calls({"id": "call12345"})), "error", "messages[1].tool_calls[0]"),
    # and those of its rules at which a run of ours goes on
    "a call has an id": (of(asks(), calls(call(id=None))), "warning", "a call without an id"),
    "ids are unique": (of(asks(), calls(call(), call())), "warning", "the id of another call"),
    "a function's name": (of(asks(), calls(call(name="the weather!"))), "warning", "1 to 64 letters"),
    "arguments are JSON": (of(asks(), calls(call(arguments="{city"))), "warning", "no JSON object"),
    "arguments are an object": (of(asks(), calls(call(arguments="[1]"))), "warning", "no JSON object"),
    "a result has an id": (of(asks(), calls(call()), tool(), says()), "warning", "without a tool_call_id"),
    "a result has a call": (
        of(asks(), calls(call()), tool(tool_call_id="callabcde"), says()),
        "warning",
        "for a call that is not open (messages[2].tool_call_id)",
    ),
    "as many results as calls": (
        of(asks(), calls(call(), call(id="call67890")), tool(tool_call_id="call12345"), says()),
        "warning",
        "not equally many (messages[3])",
    ),
    "a tool has a function": (of(asks(), says(), tools=[{"function": "x"}]), "warning", "a tool without a function"),
    "a tool's name": (of(asks(), says(), tools=[without("name")]), "warning", "1 to 64 letters"),
    "a tool's description": (of(asks(), says(), tools=[without("description")]), "warning", "without a description"),
    "a tool's parameters": (of(asks(), says(), tools=[without("parameters")]), "warning", "no JSON schema"),
    # what else is looked for
    "empty question": (chat(" ", "x"), "warning", "empty user message (messages[0].content)"),
    "control token": (chat("x", "y<|im_end|>"), "warning", "'<|im_end|>' looks like a control token"),
    "Dolly's end": (chat("x", "y###eos_token###"), "warning", "'###eos_token###' looks like a control token"),
    "decoding gone wrong": (chat("caf\ufffd", "x"), "warning", "U+FFFD"),
    "duplicate": (chat("question c", "answer c"), "warning", ": the same row as "),
    "near duplicate": (chat(" Question  C?", "answer, c"), "warning", "punctuation the same row as "),
    "half of a surrogate pair": (chat("x", "\ud83d"), "error", "half of a surrogate pair"),
}


def written(directory, rows, name="train.jsonl"):
    path = directory / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tk.JsonLines(path=path)


def problems(report):
    return [str(finding) for finding in report.problems]


@pytest.mark.parametrize("rule", PLANTED)
def test_a_planted_row_is_found_for_what_it_is(rule, tmp_path):
    row, severity, expected = PLANTED[rule]
    report = tk.validate(written(tmp_path, [*SOUND, row]))
    found = [finding for finding in report.problems if expected in str(finding)]
    assert [finding.severity for finding in found] == [severity], problems(report)
    assert report.problems == tuple(found)
    assert report.ok == (severity == "warning")
    line = 1 if rule == "no system message" else 27
    assert str(found[0]).startswith(f"{tmp_path / 'train.jsonl'}:{line}: ")
    assert f"1 {severity}" in str(report)


def test_sound_rows_give_no_problem(tmp_path):
    report = tk.validate(written(tmp_path, SOUND))
    assert report.ok
    assert report.problems == ()
    assert str(report).startswith("validation: ok, 0 errors, 0 warnings")


# With a model -----------------------------------------------------------------------------------------------------


def lengths_of(model, rows, trainer=None):
    """Tokens and supervised tokens of each row, from the codec itself."""
    codec = Codec(Base(model=model).tokenizer())
    encoded = [(trainer or tk.SFT()).encode(row, codec) for row in rows]
    return [len(row["input_ids"]) for row in encoded], [
        sum(label != IGNORED for label in row["labels"][1:]) for row in encoded
    ]


def test_the_figures_are_those_of_an_independent_count(model, tmp_path):
    rows = [
        *SOUND,
        chat("question a", "answer a"),
        chat("QUESTION, a", "answer a."),
        chat("question a", "something else"),
        of(("system", {"content": "Be brief."}), asks(), says(), asks("And now?"), says("Rain.")),
    ]
    report = tk.validate(written(tmp_path, rows), model=model)
    lengths, supervised = lengths_of(model, rows)
    figures = report.splits["train"]
    said = [message for row in rows for message in row["messages"]]
    assert (figures.rows, figures.sound) == (30, 30)
    assert figures.schemas == {"messages": 30}
    assert figures.roles == Counter(message["role"] for message in said)
    assert figures.turns.maximum == 5
    assert figures.turns.total == len(said)
    assert figures.without_system == 29
    for found, expected in ((figures.lengths, lengths), (figures.supervised, supervised)):
        assert found.p50 == pytest.approx(numpy.percentile(expected, 50))
        assert found.p95 == pytest.approx(numpy.percentile(expected, 95))
        assert found.mean == pytest.approx(numpy.mean(expected))
        assert (found.minimum, found.maximum, found.total) == (min(expected), max(expected), sum(expected))
    assert (figures.duplicates, figures.near_duplicates, figures.repeated_prompts) == (1, 1, 1)
    assert (report.tokens, report.supervised_tokens) == (sum(lengths), sum(supervised))
    assert figures.labels is None


def test_characters_are_counted_where_there_is_no_model(tmp_path):
    report = tk.validate(written(tmp_path, [chat("four", "sixsix")] * 3))
    assert report.unit == "characters"
    assert report.splits["train"].lengths.total == 30
    assert report.tokens is None
    assert "No model was given" in str(report)


def test_time_and_cost_are_those_of_all_epochs(model, tmp_path):
    report = tk.validate(
        written(tmp_path, SOUND), model=model, epochs=4, tokens_per_second=10, price_per_million_tokens=2
    )
    tokens = sum(lengths_of(model, SOUND)[0])
    assert report.seconds == pytest.approx(tokens * 4 / 10)
    assert report.cost == pytest.approx(tokens * 4 * 2 / 1e6)
    assert tk.validate(written(tmp_path, SOUND), model=model, trainer=tk.SFT(epochs=7)).epochs == 7


def test_the_published_example_of_mistral_finetune_takes_as_long_as_it_says():
    from tunekit.core.inspection.report import _clock

    # README of mistral-finetune: 500 steps of 8 rows of 32,768 tokens, 5,720 tokens a second on each of 8 devices.
    tokens = 500 * 8 * 32_768
    assert _clock(tokens / 8 / 5720 + 300) == "00:52:44"


@pytest.mark.parametrize(
    ("rows", "epochs"), [(1, 25), (4, 25), (5, 20), (20, 5), (33, 3), (34, 3), (8333, 3), (8334, 2), (25_001, 1)]
)
def test_epochs_are_advised_as_the_notebook_advises_them(rows, epochs):
    from tunekit.core.inspection.validation import advised_epochs

    # The notebook, word for word.
    target, least, most, fewest_epochs, most_epochs = 3, 100, 25000, 1, 25
    expected = target
    if rows * target < least:
        expected = min(most_epochs, least // rows)
    elif rows * target > most:
        expected = max(fewest_epochs, most // rows)
    assert advised_epochs(rows) == expected == epochs


@pytest.mark.parametrize(
    ("on_long", "severity", "fate"),
    [("error", "error", "stops"), ("drop", "warning", "drops"), ("truncate", "warning", "cuts")],
)
def test_a_row_that_is_too_long_is_named_with_what_becomes_of_it(model, tmp_path, on_long, severity, fate):
    rows = [*SOUND, chat("x", "a long answer " * 10)]
    lengths, _ = lengths_of(model, rows)
    source = written(tmp_path, rows)
    report = tk.validate(source, model=model, trainer=tk.SFT(max_length=40, on_long=on_long))
    assert problems(report) == [
        f"{source.path}:27: {lengths[-1]:,} tokens, more than the 40 that are taken; "
        + {"stops": "a run stops there", "drops": "a run drops it", "cuts": "a run cuts it"}[fate]
    ]
    assert report.problems[0].severity == severity
    assert (report.over_length, report.sufficient_length) == (1, max(lengths))
    assert report.tokens == sum(lengths[:-1]) + (40 if on_long == "truncate" else 0)
    assert tk.validate(source, model=model, trainer=tk.SFT(max_length=report.sufficient_length)).ok
    assert not tk.validate(source, model=model, trainer=tk.SFT(max_length=report.sufficient_length - 1)).ok


def test_a_text_that_is_split_counts_as_often_as_a_run_counts_it(model, tmp_path):
    rows = [{"text": "word " * number} for number in range(1, 40)]
    pipeline = tk.Pipeline(
        model=model, data=written(tmp_path, rows), trainer=tk.SFT(max_length=50, on_long="split"), validation=0
    )
    report, plan = pipeline.validate(), pipeline.plan()
    assert report.ok
    assert report.over_length == len(report.warnings) > 0
    assert (report.training_rows, report.tokens) == (plan.rows, plan.tokens)
    assert report.supervised_tokens == plan.supervised_tokens
    refused = tk.validate(
        written(tmp_path, [*SOUND, chat("x", "long " * 40)]),
        model=model,
        trainer=tk.SFT(max_length=50, on_long="split"),
    )
    assert "only plain texts can be split" in problems(refused)[0]
    assert not refused.ok


def test_a_row_that_no_max_length_is_enough_for_is_said_to_be_one(model, tmp_path):
    report = tk.validate(written(tmp_path, [*SOUND, chat("x", "long " * 200)]), model=model)
    assert report.limit == report.context_length == 256
    assert "the model takes 256, so no max_length" in " ".join(str(report).split())


def test_a_row_that_is_cut_before_its_answer_is_dropped_and_said_to_be(model, tmp_path):
    report = tk.validate(
        written(tmp_path, [*SOUND, chat("a long question " * 20, "x")]),
        model=model,
        trainer=tk.SFT(max_length=40, on_long="truncate"),
    )
    assert "drops it, since nothing before the cut" in problems(report)[0]
    assert report.training_rows == 26


def test_a_row_without_supervised_tokens_is_an_error(model, tmp_path):
    row = of(asks(), ("assistant", {"content": "x", "weight": 0}))
    report = tk.validate(written(tmp_path, [*SOUND, row]), model=model)
    assert problems(report) == [f"{tmp_path / 'train.jsonl'}:27: no assistant turn to train on (messages)"]
    assert not report.ok


def test_a_row_that_a_trainer_encodes_without_anything_to_learn_is_an_error(model, tmp_path):
    class Mute(tk.SFT):
        name = "mute"

        def encode(self, example, codec):
            found = codec.encode(example)
            return {**found, "labels": [IGNORED] * len(found["labels"])}

    report = tk.validate(written(tmp_path, SOUND), model=model, trainer=Mute())
    assert [finding.place[-2:] for finding in report.errors[:26]] == [
        f"{line}"[-2:].rjust(2, ":") for line in range(1, 27)
    ]
    assert "no token of it carries loss" in problems(report)[0]


def test_plain_texts_have_no_prompts_to_repeat(tmp_path):
    report = tk.validate(written(tmp_path, [{"text": f"text {number}"} for number in range(20)]))
    assert report.splits["train"].repeated_prompts == 0
    assert report.splits["train"].schemas == {"text": 20}


def test_what_the_template_refuses_is_an_error_of_that_row(model, tmp_path):
    template = (
        "{%- for message in messages -%}{%- for call in message.tool_calls or [] -%}{%- if call.id | length != 9 -%}"
        "{{ raise_exception('ids must have 9 characters') }}{%- endif -%}{%- endfor -%}"
        "{{- message.role + ': ' + (message.content or 'calls') + eos_token -}}{%- endfor -%}"
        "{{- 'assistant: ' if add_generation_prompt -}}"
    )
    rows = [*SOUND, of(asks(), calls(call())), of(asks("And there?"), calls(call(id="short")))]
    report = tk.validate(written(tmp_path, rows), model=model, template=template)
    assert len(report.errors) == 1
    assert (
        "train.jsonl:28: the chat template refuses this conversation: ids must have 9 characters" in problems(report)[0]
    )


def test_control_tokens_of_the_tokenizer_in_use_are_found(model, tmp_path):
    token = Base(model=model).tokenizer().eos_token
    report = tk.validate(written(tmp_path, [*SOUND, chat(f"end{token}", "x")]), model=model)
    assert [finding.field for finding in report.warnings] == ["messages[0].content"]


# The rows together ------------------------------------------------------------------------------------------------


def labelled(counts):
    rows = [(name, number) for name, count in counts.items() for number in range(count)]
    return [chat(f"sentence {number} of {name}", name) for name, number in rows]


def test_labels_are_counted_and_a_majority_is_warned_of(tmp_path):
    report = tk.validate(written(tmp_path, labelled({"good": 45, "bad": 5})))
    assert report.splits["train"].labels == {"good": 45, "bad": 5}
    assert report.splits["train"].majority == 0.9
    assert problems(report) == [
        f"{tmp_path / 'train.jsonl'}: 90% of the answers are 'good', so always saying that looks good"
    ]
    assert tk.validate(written(tmp_path, labelled({"good": 30, "bad": 20}))).problems == ()


def test_one_answer_for_all_rows_is_warned_of(tmp_path):
    report = tk.validate(written(tmp_path, labelled({"good": 20})))
    assert "every row has the same answer" in problems(report)[0]


def test_data_with_many_answers_is_no_classification(tmp_path):
    assert tk.validate(written(tmp_path, SOUND)).splits["train"].labels is None
    many = labelled({f"label {number}": 5 for number in range(101)})
    assert tk.validate(written(tmp_path, many)).splits["train"].labels is None
    assert len(tk.validate(written(tmp_path, many[:500])).splits["train"].labels) == 100


def test_leaks_from_a_source_of_held_out_rows_are_found_with_where_they_are_trained_on(tmp_path):
    train = written(tmp_path, SOUND)
    held = [
        chat("question b", "answer b"),
        chat("Question c", "answer  c!"),
        chat("question d", "something else"),
        chat("question, E", "something else"),
        chat("a new question", "answer a"),
    ]
    report = tk.validate(train, validation=written(tmp_path, held, "held.jsonl"))
    found = [finding for finding in report.problems if "held.jsonl:" in str(finding) and "train.jsonl:" in str(finding)]
    assert [(finding.place[-1], finding.reason[-1]) for finding in found] == [
        ("1", "2"),
        ("2", "3"),
        ("3", "4"),
        ("4", "5"),
    ]
    assert report.leaked == 4
    assert len({finding.group for finding in found}) == 4
    assert {finding.severity for finding in found} == {"warning"}
    assert report.validation_rows == 5


def test_numbers_and_operators_keep_prompts_apart(tmp_path):
    train = written(tmp_path, [chat(text, "x") for text in ("2 + 3", "1.5 kg", "12 3", "-4", "10%")])
    held = [chat(text, "y") for text in ("2 - 3", "15 kg", "1 23", "4", "10")]
    assert tk.validate(train, validation=written(tmp_path, held, "held.jsonl")).leaked == 0


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.99])
def test_a_share_is_held_out_as_a_run_does_it_and_its_leaks_are_found(model, tmp_path, share):
    rows = [chat(f"question {number // 2}", f"answer {number}") for number in range(40)]
    source = written(tmp_path, rows)
    report = tk.validate(source, model=model, validation=share, seed=3)
    pipeline = tk.Pipeline(model=model, data=source, validation=share, seed=3)
    train, held = pipeline.rows()
    assert (report.training_rows, report.validation_rows) == (len(train), len(held))
    assert report.tokens == sum(lengths_of(model, train)[0])
    asked = {row["messages"][0]["content"] for row in train}
    assert report.leaked == sum(row["messages"][0]["content"] in asked for row in held)


def test_too_few_different_rows_for_a_share_are_an_error(tmp_path):
    source = written(tmp_path, [chat("x", "y")] * 12)
    assert tk.validate(source).ok
    report = tk.validate(source, validation=0.1)
    assert len(report.errors) == 1
    assert "a validation share needs at least two different rows" in problems(report)[0]


# Writing and showing it -------------------------------------------------------------------------------------------

BROKEN = [
    SOUND[0],
    chat("x"),
    of(("user", {"content": "Grüße 🌧"}), says("naïve"), tools=[TOOL]),
    chat("x", " "),
    chat("x", "long " * 100),
    of(asks(), says(), asks("And now?"), says("Rain.")),
    "text",
]


def test_the_corrected_file_holds_the_rows_that_a_run_takes(model, tmp_path):
    report = tk.validate(written(tmp_path, BROKEN), model=model, trainer=tk.SFT(max_length=200))
    assert len(report.errors) == 4
    done = report.write_corrected(tmp_path / "new.jsonl")
    assert (done.rows, done.left_out) == (3, 4)
    assert "3 rows written, 4 left out" in str(done)
    lines = (tmp_path / "new.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [BROKEN[0], BROKEN[2], BROKEN[5]]
    again = tk.validate(tk.JsonLines(path=tmp_path / "new.jsonl"), model=model, trainer=tk.SFT(max_length=200))
    assert again.ok
    assert again.tokens == report.tokens


def test_nothing_is_overwritten(tmp_path):
    source = written(tmp_path, SOUND)
    before = (tmp_path / "train.jsonl").read_bytes()
    with pytest.raises(tk.ConfigError, match="exists, and is not overwritten"):
        tk.validate(source).write_corrected(source.path)
    assert (tmp_path / "train.jsonl").read_bytes() == before
    with pytest.raises(tk.ConfigError, match="cannot write"):
        tk.validate(source).write_corrected(tmp_path / "nowhere" / "new.jsonl")


def test_rows_that_were_not_validated_are_not_written(tmp_path):
    source = written(tmp_path, SOUND)
    report = tk.validate(source)
    written(tmp_path, [*SOUND[:-1], chat("a new question", "a new answer")])
    with pytest.raises(tk.DataError, match="has changed since it was validated"):
        report.write_corrected(tmp_path / "new.jsonl")
    assert not (tmp_path / "new.jsonl").exists()


def test_the_report_is_plain_values_and_fits_a_terminal(model, tmp_path):
    source = written(tmp_path, BROKEN)
    report = tk.validate(source, model=model, validation=written(tmp_path, BROKEN, "held.jsonl"), tokens_per_second=9)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["ok"] is False
    assert len(plain["problems"]) == len(report.problems)
    assert sum(group["count"] for group in plain["groups"]) == len(report.problems)
    assert plain["splits"]["train"]["rows"] == 7
    longest = max(len(line.replace(str(tmp_path), "")) for line in str(report).splitlines())
    assert longest <= 120


def test_problems_are_grouped_with_the_first_places_of_each(tmp_path):
    report = tk.validate(written(tmp_path, [*SOUND, *[chat("x")] * 5]))
    assert [group.count for group in report.groups if group.severity == "error"] == [5]
    assert report.groups[0].places == tuple(f"{tmp_path / 'train.jsonl'}:{line}" for line in range(27, 32))
    assert f"{tmp_path / 'train.jsonl'}:27, 28, 29, and 2 more" in str(report).replace("\n          ", " ")


def test_a_source_that_skips_bad_rows_makes_them_warnings(tmp_path):
    path = written(tmp_path, [*SOUND, chat("x")]).path
    report = tk.validate(tk.JsonLines(path=path, on_error="skip"))
    assert report.ok
    assert [finding.place for finding in report.warnings] == [f"{path}:27"]
    assert report.splits["train"].sound == 26


def test_a_pipeline_validates_its_own_parts(model, tmp_path):
    source = written(tmp_path, [*SOUND, chat("x", "long " * 100)])
    pipeline = tk.Pipeline(model=model, data=source, trainer=tk.SFT(max_length=40, on_long="drop", epochs=2), seed=5)
    report = pipeline.validate(tokens_per_second=3)
    plan = pipeline.plan()
    assert (report.training_rows, report.validation_rows) == (plan.rows, plan.validation_rows)
    assert (report.tokens, report.supervised_tokens) == (plan.tokens, plan.supervised_tokens)
    assert report.seconds == pytest.approx(plan.tokens * 2 / 3)


@pytest.mark.parametrize(
    ("wrong", "where"),
    [({"validation": 1.5}, "validate.validation"), ({"epochs": 0}, "validate.epochs"), ({"model": "a b"}, "model")],
)
def test_arguments_that_cannot_be_used_are_refused(wrong, where):
    with pytest.raises(tk.ConfigError, match=where):
        tk.validate(tk.InMemory(rows=SOUND), **wrong)


# On random rows ---------------------------------------------------------------------------------------------------

TEXT = st.text(alphabet="ab +1.\n<|é\ud83d\ufffd\u200b", max_size=6)
VALUE = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | TEXT, lambda inner: st.lists(inner, max_size=2))
MESSAGE = st.dictionaries(st.sampled_from(["role", "content", "weight", "tool_calls", "name"]), VALUE, max_size=3)
TURN = st.tuples(TEXT, TEXT).map(lambda pair: chat(*pair)["messages"])
ROW = st.one_of(
    TURN.map(lambda messages: {"messages": messages}),
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=3)}),
    st.fixed_dictionaries({"messages": TURN, "tools": VALUE}),
    st.dictionaries(st.sampled_from(["messages", "text", "prompt", "completion"]), VALUE, max_size=2),
    st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}),
    st.fixed_dictionaries({"text": TEXT | TEXT.map(lambda text: text * 9)}),
    st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}),
)


@settings(max_examples=60)
@given(
    rows=st.lists(ROW, max_size=6),
    share=st.sampled_from([0.0, 0.3]),
    on_long=st.sampled_from(["error", "drop", "truncate", "split"]),
    on_error=st.sampled_from(["stop", "skip"]),
)
def test_validation_agrees_with_a_run_and_raises_nothing(model, rows, share, on_long, on_error):
    source = tk.InMemory(rows=rows, on_error=on_error)
    trainer = tk.SFT(max_length=30, on_long=on_long)
    report = tk.validate(source, model=model, trainer=trainer, validation=share)
    base = Base(model=model)
    try:
        run = dataset.load(source, share, trainer, Codec(base.tokenizer()), context_length(base.config()), 0)
    except tk.TunekitError:
        run = None
    assert report.ok == (run is not None), problems(report)
    assert str(report)
    json.dumps(report.to_dict())
    if run is not None:
        assert (report.training_rows, report.validation_rows) == (len(run.train), len(run.validation))
        assert (report.tokens, report.supervised_tokens) == (run.tokens, run.supervised_tokens)
