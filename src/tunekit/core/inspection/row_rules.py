"""What a run takes and may regret: warnings about single rows.

The rules are those of OpenAI's data preparation notebook (cookbook.openai.com/examples/chat_finetuning_data_prep) and
of mistral-finetune's validator (github.com/mistralai/mistral-finetune, utils/validate_data.py) as far as a run does not
stop at them anyway: those are errors of sources and of the codec.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tunekit.core.inspection.row_hashes import Parts

Warned = tuple[str, str]
"""A reason and the field it concerns."""

MARKS = re.compile(r"<\|[\w ]{1,40}\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>|###eos_token###")
"""Control tokens of the common chat formats, and the one that stands in published Dolly data."""
KNOWN = frozenset({"role", "content", "name", "weight", "train", "tool_calls", "tool_call_id", "function_call"})
"""What a message may have; other keys reach the template, which nearly always passes them over."""

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def warnings_of(
    rows: Sequence[Mapping[str, Any]], parts: Sequence[Parts], special: Sequence[str] = ()
) -> Iterator[tuple[int, str, str]]:
    """Yield what is odd about examples: the position of the row, the reason and the field.

    Args:
        rows: the examples.
        parts: the same, taken apart.
        special: control tokens of the tokenizer in use.
    """
    # Looking through all at once costs next to nothing, and nearly always is enough.
    marked = _has_marks("\n".join([text for row in parts for text in (row.prompt, row.answer)]), special)
    for at, (_, _, prompt, answer, more) in enumerate(parts):
        if marked and (_has_marks(prompt, special) or _has_marks(answer, special)):
            for field, text in _texts(rows[at]):
                yield from ((at, *warned) for warned in _marks(field, text, special))
        if more or "\n" in prompt or not prompt or prompt.isspace():
            yield from ((at, *warned) for warned in _oddities(rows[at], calls=bool(more)))


def _oddities(row: Mapping[str, Any], calls: bool) -> Iterator[Warned]:
    if "text" in row and not row["text"].strip():
        yield "empty text", "text"
    if "messages" in row:
        yield from _messages(row["messages"])
        yield from _tools(row.get("tools") or ())
        if calls:
            yield from _calls(row["messages"])


def _has_marks(text: str, special: Sequence[str]) -> bool:
    """Whether a close look is worth it; looking for single characters costs nearly nothing."""
    odd = "<" in text or "[" in text or "#" in text or "\ufffd" in text
    return odd or any(token in text for token in special)


def _texts(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "text" in row:
        yield "text", row["text"]
    for column in ("messages", "prompt", "chosen", "rejected"):
        for index, message in enumerate(row.get(column, ())):
            yield f"{column}[{index}].content", message.get("content") or ""


def _marks(field: str, text: str, special: Sequence[str]) -> Iterator[Warned]:
    found = MARKS.search(text)
    token = found.group() if found else next((token for token in special if token in text), None)
    if token:
        yield f"{token!r} looks like a control token; it is read as plain text", field
    if "\ufffd" in text:
        yield "holds U+FFFD, which stands for what could not be decoded", field


def _messages(messages: Sequence[Mapping[str, Any]]) -> Iterator[Warned]:
    for index, message in enumerate(messages):
        for key in message.keys() - KNOWN:
            yield f"unknown key {key!r}; only a chat template that knows it uses it", f"messages[{index}]"
        content = message.get("content")
        if message["role"] != "assistant" and isinstance(content, str) and not content.strip():
            yield f"empty {message['role']} message", f"messages[{index}].content"


def _tools(tools: Sequence[Any]) -> Iterator[Warned]:
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            yield "a tool without a function", f"tools[{index}]"
            continue
        yield from _name(function.get("name"), f"tools[{index}].function.name")
        if not isinstance(function.get("description"), str):
            yield "a tool without a description", f"tools[{index}].function.description"
        if not isinstance(function.get("parameters"), Mapping):
            yield "a tool whose parameters are no JSON schema", f"tools[{index}].function.parameters"


def _name(name: Any, field: str) -> Iterator[Warned]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        yield "a function's name must be of 1 to 64 letters, digits, _ and -", field


def _calls(messages: Sequence[Mapping[str, Any]]) -> Iterator[Warned]:
    """What is odd about calls of tools and the results that follow them."""
    open_calls: list[Any] = []
    seen: set[str] = set()
    asked = 0
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if message["role"] == "tool":
            asked -= 1
            answered = message.get("tool_call_id")
            if answered is None:
                yield "a tool's result without a tool_call_id", f"{field}.tool_call_id"
            elif answered not in open_calls:
                yield "a tool's result for a call that is not open", f"{field}.tool_call_id"
            else:
                open_calls.remove(answered)
            continue
        if asked:
            yield "the calls of the assistant and the results that follow are not equally many", field
        calls = message.get("tool_calls") or ()
        asked, open_calls = len(calls), []
        for number, call in enumerate(calls):
            place = f"{field}.tool_calls[{number}]"
            if not isinstance(call, Mapping):
                yield "a call that is no object", place
                continue
            known = call.get("id")
            open_calls.append(known)
            if not isinstance(known, str):
                yield "a call without an id", f"{place}.id"
            elif known in seen:
                yield "the id of another call of this conversation", f"{place}.id"
            else:
                seen.add(known)
            yield from _function(call.get("function"), f"{place}.function")


def _function(function: Any, field: str) -> Iterator[Warned]:
    if not isinstance(function, Mapping):
        yield "a call without a function", field
        return
    yield from _name(function.get("name"), f"{field}.name")
    arguments = function.get("arguments")
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, Mapping):
        yield "arguments of a call that are no JSON object", f"{field}.arguments"
