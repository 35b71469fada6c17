"""Rows are recognised, checked, and refused with their place and field."""

import pytest

from tunekit import DataError
from tunekit.core.data.schemas import recognise, to_example

PAIR = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def user(content="q"):
    return {"role": "user", "content": content}


def assistant(content="a", **more):
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize(
    ("row", "schema", "example"),
    [
        (PAIR, "messages", PAIR),
        ({**PAIR, "id": 7}, "messages", PAIR),
        ({"prompt": "q", "completion": "a"}, "prompt-completion", PAIR),
        ({"question": "q", "answer": "a"}, "question-answer", PAIR),
        ({"instruction": "q", "output": "a"}, "instruction", PAIR),
        ({"instruction": "q", "input": "", "output": "a"}, "instruction", PAIR),
        ({"text": "once"}, "text", {"text": "once"}),
    ],
)
def test_a_row_is_recognised_and_converted(row, schema, example):
    assert recognise(row, "f:1") == schema
    assert to_example(row, schema, "f:1") == example


def test_the_input_of_an_instruction_follows_it():
    example = to_example({"instruction": "Add.", "input": "1 2", "output": "3"}, "instruction", "f:1")
    assert example["messages"][0]["content"] == "Add.\n\n1 2"


def test_columns_map_the_schemas_names_to_the_datas():
    row = {"frage": "q", "antwort": "a", "prompt": "something else"}
    columns = {"prompt": "frage", "completion": "antwort"}
    assert to_example(row, "prompt-completion", "f:1", columns) == PAIR


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], r"f:3: empty conversation \(messages\)"),
        ("hello", r"expected a list of messages, got text \(messages\)"),
        ([assistant()], r"role 'assistant' cannot come first \(messages\[0\].role\)"),
        ([user(), user(), assistant()], r"role 'user' cannot come after 'user' \(messages\[1\].role\)"),
        ([user(), {"role": "system", "content": "s"}, assistant()], r"'system' cannot come after 'user'"),
        ([user()], r"must end with the assistant, not with 'user' \(messages\[0\].role\)"),
        ([user(), {"role": "asistant", "content": "a"}], r"unknown role 'asistant'; did you mean 'assistant'"),
        ([user(), assistant("  ")], r"empty answer, nothing to learn from \(messages\[1\].content\)"),
        ([user(None), assistant()], r"null where text is required \(messages\[0\].content\)"),
        ([user(3), assistant()], r"expected text, got number 3 \(messages\[0\].content\)"),
        ([user(), {"role": "assistant"}], r"missing \(messages\[1\].content\)"),
        (["q", "a"], r"expected an object with role and content, got text \(messages\[0\]\)"),
        ([user("\ud800"), assistant()], r"half of a surrogate pair"),
    ],
)
def test_a_conversation_that_cannot_be_trained_on_is_refused(messages, problem):
    with pytest.raises(DataError, match=problem):
        to_example({"messages": messages}, "messages", "f:3")


def test_a_call_of_a_tool_needs_no_content():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    messages = [user(), call, {"role": "tool", "content": "1"}, assistant()]
    example = to_example({"messages": messages, "tools": [{"type": "function"}]}, "messages", "f:1")
    assert example == {"messages": messages, "tools": [{"type": "function"}]}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "q"}, r"f:1: missing \(completion\)"),
        ({"completion": "a"}, r"f:1: missing \(prompt\)"),
        ({"a": 1, "b": 2}, "no known schema has the columns 'a', 'b'; known: messages; conversations; chosen"),
        ({}, r"no known schema has the columns \(none\)"),
    ],
)
def test_a_row_that_fits_no_schema_is_refused_with_its_columns(row, problem):
    with pytest.raises(DataError, match=problem):
        recognise(row, "f:1")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": None}, r"null where text is required \(text\)"),
        ({"text": 42}, r"expected text, got number 42 \(text\)"),
        ({"text": True}, r"got boolean True"),
        ({"text": " "}, r"empty text \(text\)"),
        ({"body": "x"}, r"missing \(text\)"),
    ],
)
def test_a_text_must_be_text(row, problem):
    with pytest.raises(DataError, match=problem):
        to_example(row, "text", "f:1")


def test_a_column_that_is_mapped_but_not_there_is_refused_with_a_suggestion():
    with pytest.raises(DataError, match=r"missing \(anser\); did you mean 'answer'"):
        to_example({"question": "q", "answer": "a"}, "prompt-completion", "f:1", {"completion": "anser"})
