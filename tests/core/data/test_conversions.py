"""Every schema becomes an example, and an example goes back to every schema that can hold it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunekit import ConfigError, DataError, from_example, to_example
from tunekit.core.data.preferences import from_transcript
from tunekit.core.data.schemas import SCHEMAS, recognise

TEXT = st.text(max_size=20)
ANSWER = TEXT.filter(str.strip)
MORE = st.sampled_from([{}, {}, {"weight": 0}, {"weight": 1}, {"train": False}])
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
PAIR = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@st.composite
def conversations(draw, tools=True):
    """A sound conversation: maybe a system message, turns, calls of tools, weights."""
    messages = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXT)})
        if tools and draw(st.booleans()):
            messages += [{**CALL, **draw(MORE)}, {"role": "tool", "content": draw(TEXT)}]
        messages.append({"role": "assistant", "content": draw(ANSWER), **draw(MORE)})
    return {"messages": messages, "tools": TOOLS} if tools and draw(st.booleans()) else {"messages": messages}


PAIRS = st.tuples(TEXT, ANSWER).map(
    lambda pair: {"messages": [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]}
)


@given(conversations())
def test_messages_come_back_as_they_were(example):
    assert to_example(from_example(example, "messages"), "messages", "f:1") == example


@given(conversations(tools=False))
def test_conversations_come_back_as_they_were(example):
    row = from_example(example, "conversations")
    assert recognise(row, "f:1") == "conversations"
    assert to_example(row, "conversations", "f:1") == example


@given(conversations())
def test_prompt_and_completion_keep_what_is_said_and_what_is_learned(example):
    row = json.loads(json.dumps(from_example(example, "prompt-completion")))
    back = to_example(row, "prompt-completion", "f:1")
    assert back.get("tools") == example.get("tools")
    assert [spoken(message) for message in back["messages"]] == [spoken(message) for message in example["messages"]]


def spoken(message):
    """What is said, and whether it is learned."""
    learned = message["role"] == "assistant" and message.get("weight", 1) != 0 and message.get("train", True)
    return {key: value for key, value in message.items() if key not in ("weight", "train")}, learned


@given(PAIRS, st.sampled_from(sorted(SCHEMAS.keys() - {"text", "preference"})))
def test_one_question_and_one_answer_fit_every_schema(example, schema):
    row = from_example(example, schema)
    assert recognise(row, "f:1") == schema
    assert to_example(row, schema, "f:1") == example


@given(ANSWER)
def test_a_text_comes_back_as_it_was(text):
    assert to_example(from_example({"text": text}, "text"), "text", "f:1") == {"text": text}


@given(conversations(), ANSWER, ANSWER)
def test_a_preference_comes_back_as_it_was(example, chosen, rejected):
    prompt = example["messages"][:-1]
    if chosen == rejected:
        rejected += "!"
    said = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", chosen), ("rejected", rejected))
    }
    preference = {"prompt": prompt, **said}
    assert to_example(from_example(preference, "preference"), "preference", "f:1") == preference
    # The same as two whole conversations, without a column of its own for the prompt.
    whole = {name: [*prompt, *answer] for name, answer in said.items()}
    assert to_example(whole, "preference", "f:1") == preference


@given(st.lists(st.tuples(TEXT, ANSWER), min_size=1, max_size=3))
def test_a_transcript_is_taken_apart_where_its_headings_are(turns):
    turns = [tuple(text.replace("\n\nHuman:", "").replace("\n\nAssistant:", "") for text in turn) for turn in turns]
    text = "".join(f"\n\nHuman: {asked}\n\nAssistant: {answer}" for asked, answer in turns)
    messages = from_transcript(text)
    assert [(a["content"], b["content"]) for a, b in zip(messages[::2], messages[1::2], strict=True)] == turns


@pytest.mark.parametrize(
    ("example", "schema", "problem"),
    [
        ({"text": "a"}, "messages", "cannot hold a plain text"),
        (PAIR, "text", "cannot hold a conversation"),
        (PAIR, "preference", "cannot hold one answer"),
        (
            {"messages": [{"role": "system", "content": "s"}, *PAIR["messages"]]},
            "instruction",
            "more than one question",
        ),
        ({**PAIR, "tools": TOOLS}, "question-answer", "more than one question"),
        ({"messages": [PAIR["messages"][0], CALL]}, "conversations", "a message with tool_calls"),
    ],
)
def test_what_a_schema_cannot_hold_is_refused(example, schema, problem):
    with pytest.raises(DataError, match=problem):
        from_example(example, schema)


def test_a_schema_that_is_not_there_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="no schema 'mesages'; did you mean 'messages'"):
        from_example(PAIR, "mesages")


@pytest.mark.parametrize("nothing", ["", " ", "<noinput>", "No input.", "no input", "N/A", None, "<NoInput>"])
def test_no_input_is_none_however_it_is_written(nothing):
    row = {"instruction": "q", "input": nothing, "output": "a"}
    assert to_example(row, "instruction", "f:1") == PAIR


def test_the_context_of_an_instruction_follows_it():
    row = {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada.", "category": "qa"}
    assert recognise(row, "f:1") == "instruction-response"
    assert to_example(row, "instruction-response", "f:1")["messages"][0]["content"] == "Who?\n\nAda wrote it."


def test_turns_of_sharegpt_with_tools_and_a_system_column():
    row = {
        "system": "s",
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": json.dumps(TOOLS),
    }
    call = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert to_example(row, "conversations", "f:1") == {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": call},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "a"},
        ],
        "tools": TOOLS,
    }


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ("q", r"expected a list of turns, got text \(conversations\)"),
        ([], r"empty conversation \(conversations\)"),
        ([{"from": "gpt", "value": "a"}], r"role 'assistant' cannot come first \(conversations\[0\].from\)"),
        ([{"from": "human", "value": None}], r"null where text is required \(conversations\[0\].value\)"),
        ([{"from": "bard", "value": "a"}], r"unknown speaker 'bard'; known: human, .* \(conversations\[0\].from\)"),
        ([{"from": "human"}], r"missing \(conversations\[0\].value\)"),
        ([{"from": "human", "value": "q"}, {"from": "function_call", "value": "f()"}], r"must be JSON .*\[1\].value\)"),
    ],
)
def test_turns_that_cannot_be_trained_on_are_refused_in_their_own_words(turns, problem):
    with pytest.raises(DataError, match=problem):
        to_example({"conversations": turns}, "conversations", "f:1")


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"weight": 0.5}, r"weight must be 0 \(not learned\) or 1, got 0.5 \(messages\[1\].weight\)"),
        ({"weight": True}, r"weight must be 0"),
        ({"train": "no"}, r"train must be true or false, got 'no' \(messages\[1\].train\)"),
        ({"tool_calls": "f"}, r"expected a list of calls, got text \(messages\[1\].tool_calls\)"),
        ({"tool_calls": [{"name": "f"}]}, r"function.name and function.arguments \(messages\[1\].tool_calls\[0\]\)"),
        ({"name": "\ud800"}, r"half of a surrogate pair"),
    ],
)
def test_what_a_message_has_besides_is_checked(message, problem):
    messages = [PAIR["messages"][0], {**PAIR["messages"][1], **message}]
    with pytest.raises(DataError, match=problem):
        to_example({"messages": messages}, "messages", "f:1")


def test_dialects_of_openai_are_evened_out():
    messages = [
        {"role": "developer", "content": "s", "tool_calls": None, "weight": None},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "1"},
        {"role": "assistant", "content": "a", "weight": 1},
    ]
    assert to_example({"messages": messages}, "messages", "f:1")["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        CALL,
        {"role": "tool", "name": "f", "content": "1"},
        {"role": "assistant", "content": "a", "weight": 1},
    ]


def test_of_a_prompt_in_messages_no_answer_is_learned():
    row = {"prompt": [*PAIR["messages"], {"role": "user", "content": "and?"}], "completion": "b"}
    found = to_example(row, "prompt-completion", "f:1")["messages"]
    assert [message.get("weight") for message in found] == [None, 0, None, None]


@pytest.mark.parametrize(
    ("row", "labels", "answer"),
    [
        ({"text": "t", "label": "good"}, (), "good"),
        ({"text": "t", "label": 1}, ("bad", "good"), "good"),
        ({"text": "t", "label": "1"}, ("bad", "good"), "good"),
        ({"text": "t", "label": 2}, ("bad", "good"), "label 2, and there are 2 names"),
        ({"text": "t", "label": -1}, ("bad", "good"), "label -1"),
        ({"text": "t", "label": 1}, (), r"label 1 has no name; give labels="),
        ({"text": "t", "label": "9" * 5000}, ("bad", "good"), "label '999"),
        ({"text": "t", "label": "fine"}, ("bad", "good"), "label 'fine' is none of bad, good"),
        ({"text": "t", "label": 0.5}, ("bad", "good"), "expected text, got number 0.5"),
        ({"text": "t", "label": True}, ("bad", "good"), "expected text, got boolean True"),
    ],
)
def test_a_label_is_answered_by_its_name(row, labels, answer):
    assert recognise(row, "f:1") == "text-label"
    try:
        found = to_example(row, "text-label", "f:1", labels=labels)["messages"][1]["content"]
    except DataError as error:
        found = str(error).removeprefix("f:1: ")
    assert found.startswith(answer.rstrip("="))


HUMAN = "\n\nHuman: q\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "chosen"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "a"),
        ({"chosen": f"{HUMAN} a", "rejected": f"{HUMAN} b"}, "a"),
        ({"prompt": HUMAN, "chosen": " a", "rejected": " b"}, " a"),
        ({"prompt": "q", "chosen": [*PAIR["messages"]], "rejected": "b"}, "a"),
    ],
)
def test_preferences_are_known_in_all_their_forms(row, chosen):
    found = to_example(row, "preference", "f:1")
    assert found["prompt"] == [{"role": "user", "content": "q"}]
    assert [found[name][0]["content"].strip() for name in ("chosen", "rejected")] == [chosen.strip(), "b"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "q", "chosen": "a"}, r"missing \(rejected\)"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, r"the same, so neither is preferred \(rejected\)"),
        (
            {"prompt": "q", "chosen": "", "rejected": "a"},
            r"empty answer, nothing to learn from \(chosen\[0\].content\)",
        ),
        ({"chosen": f"{HUMAN} a", "rejected": "\n\nHuman: p\n\nAssistant: b"}, r"prompts of the two sides differ"),
        ({"chosen": "a", "rejected": "b"}, r"prompts of the two sides differ"),
        ({"prompt": "q", "chosen": 1, "rejected": "b"}, r"expected text, got number 1 \(chosen\)"),
        ({"prompt": "p", "chosen": [*PAIR["messages"]], "rejected": "b"}, r"neither with the assistant nor with the"),
        ({"prompt": [{}], "chosen": "a", "rejected": "b"}, r"unknown role None.* \(prompt\[0\].role\)"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, r"cannot come first \(chosen\[0\].role\)"),
    ],
)
def test_a_preference_that_prefers_nothing_is_refused(row, problem):
    with pytest.raises(DataError, match=problem):
        to_example(row, "preference", "f:1")
