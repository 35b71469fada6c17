"""From an example back to a row of a schema: what the converter of that schema turns into the same example.

Nothing is left out to make an example fit: what a schema cannot hold (a system message, a second turn, a tool call) is
a DataError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunekit.errors import DataError

_NAMES = {"user": "human", "assistant": "gpt", "system": "system", "tool": "tool"}


def to_messages(example: Mapping[str, Any]) -> dict[str, Any]:
    """Any conversation, as it is."""
    return {"messages": _messages(example, "messages"), **_tools(example)}


def to_conversations(example: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation of texts; a turn keeps its weight."""
    turns = []
    for message in _messages(example, "conversations"):
        more = {key: value for key, value in message.items() if key not in ("role", "content")}
        if "content" not in message or more.keys() - {"weight", "train"}:
            raise _cannot("conversations", f"a message with {', '.join(sorted(more))}")
        turns.append({"from": _NAMES[message["role"]], "value": message["content"], **more})
    return {"conversations": turns, **_tools(example)}


def to_prompt(example: Mapping[str, Any]) -> dict[str, Any]:
    """Two texts where there is one question and one answer, else two lists of messages."""
    messages = _messages(example, "prompt-completion")
    pair = _pair(messages)
    if pair:
        return {"prompt": pair[0], "completion": pair[1], **_tools(example)}
    learned = [at for at, message in enumerate(messages) if message["role"] == "assistant" and _is_learned(message)]
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    begin = learned[0] if learned else answers[-1]
    return {"prompt": messages[:begin], "completion": messages[begin:], **_tools(example)}


def to_instruction(example: Mapping[str, Any]) -> dict[str, Any]:
    """One question and one answer; the question whole, with no input of its own."""
    asked, answer = _only_pair(example, "instruction")
    return {"instruction": asked, "input": "", "output": answer}


def to_context(example: Mapping[str, Any]) -> dict[str, Any]:
    """One question and one answer; the question whole, with no context of its own."""
    asked, answer = _only_pair(example, "instruction-response")
    return {"instruction": asked, "context": "", "response": answer}


def to_question(example: Mapping[str, Any]) -> dict[str, Any]:
    """One question and one answer."""
    asked, answer = _only_pair(example, "question-answer")
    return {"question": asked, "answer": answer}


def to_label(example: Mapping[str, Any]) -> dict[str, Any]:
    """One text and its label's name."""
    asked, answer = _only_pair(example, "text-label")
    return {"text": asked, "label": answer}


def to_text(example: Mapping[str, Any]) -> dict[str, Any]:
    """A plain text."""
    if "text" not in example:
        raise _cannot("text", "a conversation")
    return {"text": example["text"]}


def to_preference_row(example: Mapping[str, Any]) -> dict[str, Any]:
    """A preference, in messages."""
    if "chosen" not in example:
        raise _cannot("preference", "one answer")
    return {name: example[name] for name in ("prompt", "chosen", "rejected")}


def _messages(example: Mapping[str, Any], schema: str) -> list[dict[str, Any]]:
    if "messages" not in example:
        raise _cannot(schema, "a preference" if "chosen" in example else "a plain text")
    return list(example["messages"])


def _tools(example: Mapping[str, Any]) -> dict[str, Any]:
    return {"tools": example["tools"]} if "tools" in example else {}


def _only_pair(example: Mapping[str, Any], schema: str) -> tuple[str, str]:
    pair = _pair(_messages(example, schema))
    if pair is None or "tools" in example:
        raise _cannot(schema, "more than one question and one answer")
    return pair


def _pair(messages: list[dict[str, Any]]) -> tuple[str, str] | None:
    """The texts of a conversation that is one question and one answer and nothing else."""
    plain = [message.keys() == {"role", "content"} for message in messages]
    if [message["role"] for message in messages] != ["user", "assistant"] or not all(plain):
        return None
    return messages[0]["content"], messages[1]["content"]


def _is_learned(message: Mapping[str, Any]) -> bool:
    return message.get("weight", 1) != 0 and message.get("train", True) is not False


def _cannot(schema: str, what: str) -> DataError:
    return DataError(f"the schema {schema!r} cannot hold {what}; 'messages' holds every conversation")
